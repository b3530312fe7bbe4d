"""A small typed client of the session API: `MCPClient`, and `AsyncMCPClient` with the same methods.
Of a stage's address, `MCPClient` is a client of its layers (split/client.py).

    from mcp_vllm import MCPClient

    with MCPClient("http://127.0.0.1:7077", tenant="alice") as client:
        for session in client.sessions():
            print(session.session_id, session.num_tokens)
        client.move("chat-1", to="10.0.0.2:7077")

Every method raises `ApiError` when the agent says no or does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from mcp_vllm.errors import McpError
from mcp_vllm.session.api import (
    BLOCK_CACHE,
    DrainStep,
    Failure,
    ForkRequest,
    PinRequest,
    Placement,
    Placements,
    SessionList,
    SessionSummary,
    Transfer,
    TransferRequest,
    UploadState,
)
from mcp_vllm.session.cache_api import CacheView
from mcp_vllm.session.manifest import DEFAULT_TENANT
from mcp_vllm.unfinished_file import UnfinishedFile

if TYPE_CHECKING:
    from mcp_vllm.split.client import StageClient

DEFAULT_URL = "http://127.0.0.1:7077"
CONNECT_S = 5.0
# A move takes as long as its bytes need.
READ_S = 3600.0
PIECE_BYTES = 1 << 20
IMPORT_PATH = "/v1/sessions/import"
IMPORT_ATTEMPTS, IMPORT_PAUSE_S = 5, 0.2

_T = TypeVar("_T")


class ApiError(McpError):
    """The agent said no (`status` is the HTTP status), or could not be reached (`status` is 0)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class _Call(Generic[_T]):
    """One request: `kind` is what a good answer holds (None: nothing)."""

    method: str
    path: str
    kind: type[_T]
    body: msgspec.Struct | None = None

    @property
    def content(self) -> bytes | None:
        return None if self.body is None else msgspec.json.encode(self.body)

    def result(self, response: httpx.Response) -> _T:
        _check(response.status_code, response.content)
        if self.kind is type(None):
            return None
        try:
            return msgspec.json.decode(response.content, type=self.kind)
        except msgspec.MsgspecError as error:
            raise ApiError(response.status_code, f"not an agent's answer: {error}") from error


class _Calls:
    """The requests of one tenant, by name of operation."""

    def __init__(self, tenant: str) -> None:
        self._tenant = tenant

    def path(self, session_id: str, operation: str = "") -> str:
        names = "/".join(quote(name, safe="") for name in (self._tenant, session_id))
        return f"/v1/sessions/{names}{operation}"

    def sessions(self, after: str | None) -> _Call[SessionList]:
        place = "" if after is None else f"?after={quote(after, safe='')}"
        return _Call("GET", f"/v1/sessions{place}", SessionList)

    def session(self, session_id: str) -> _Call[SessionSummary]:
        return _Call("GET", self.path(session_id), SessionSummary)

    def explain_session(self, session_id: str) -> _Call[CacheView]:
        return _Call("GET", self.path(session_id, "/cache"), CacheView)

    def explain_block(self, key: str) -> _Call[CacheView]:
        names = {"tenant": quote(self._tenant, safe=""), "key": quote(key, safe="")}
        return _Call("GET", BLOCK_CACHE.format(**names), CacheView)

    def delete(self, session_id: str) -> _Call[None]:
        return _Call("DELETE", self.path(session_id), type(None))

    def transfer(self, session_id: str, operation: str, to: str) -> _Call[Transfer]:
        return _Call("POST", self.path(session_id, operation), Transfer, TransferRequest(to))

    def prefetch(self, session_id: str) -> _Call[Transfer]:
        return _Call("POST", self.path(session_id, "/prefetch"), Transfer)

    def placements(self, session_id: str) -> _Call[Placements]:
        return _Call("GET", self.path(session_id, "/placements"), Placements)

    def change(
        self, session_id: str, operation: str, body: msgspec.Struct | None = None
    ) -> _Call[SessionSummary]:
        return _Call("POST", self.path(session_id, operation), SessionSummary, body)

    def own(self, listed: SessionList) -> list[SessionSummary]:
        return [each for each in listed.sessions if each.tenant == self._tenant]

    def import_query(self, session_id: str | None) -> dict[str, str]:
        owner = {"tenant": self._tenant, "session_id": session_id} if session_id else {}
        return {**owner, "upload": uuid.uuid4().hex}

    def upload_state(self, query: Mapping[str, str]) -> _Call[UploadState]:
        return _Call("GET", f"/v1/sessions/import?upload={query['upload']}", UploadState)


class MCPClient:
    """Sessions of one tenant at one agent, or layers at a stage.

    Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        endpoint: str = DEFAULT_URL,
        tenant: str = DEFAULT_TENANT,
        token: str | None = None,
        *,
        auth_key: str | None = None,
        **options: Any,
    ) -> None:
        """What `endpoint` is decides what the client is for.

        Args:
            endpoint: the URL of an agent, for sessions; or HOST:PORT of a stage, or several with
                commas between them, for `execute`.
            token, auth_key: two names of a bearer token.
            options: of an agent, of httpx.Client: `verify` with the ssl.SSLContext of
                `mcp_vllm.security.tls.client_context`, `timeout`. Of a stage, of StageClient:
                `compression`, `tls`, `noise`, ...
        """
        self._endpoint = endpoint
        self._calls = _Calls(tenant)
        self._agent: httpx.Client | None = None
        self._stages: StageClient | None = None
        key = auth_key or token
        if endpoint.startswith(("http://", "https://")):
            self._agent = httpx.Client(base_url=endpoint, **(_defaults(key) | options))
        else:
            from mcp_vllm.split.client import StageClient

            self._stages = StageClient(endpoint, auth_key=key, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        for client in (self._agent, self._stages):
            if client is not None:
                client.close()

    @property
    def stages(self) -> StageClient:
        """The layers' side. Raises ApiError: the endpoint is an agent."""
        if self._stages is None:
            raise ApiError(0, f"{self._endpoint} is an agent: layers need HOST:PORT of a stage")
        return self._stages

    def execute(self, **call: Any) -> Any:
        """Hidden states through layers of a stage; the arguments are those of
        `StageClient.execute`: `input_data`, `layer_range`, `session`, `task_type`."""
        return self.stages.execute(**call)

    def sessions(self) -> list[SessionSummary]:
        """All of the tenant's, by name."""
        page = self._run(self._calls.sessions(None))
        found = self._calls.own(page)
        while page.next is not None:
            page = self._run(self._calls.sessions(page.next))
            found += self._calls.own(page)
        return found

    def session(self, session_id: str) -> SessionSummary:
        return self._run(self._calls.session(session_id))

    def explain_session(self, session_id: str) -> CacheView:
        """Why the session's blocks are kept, or are not."""
        return self._run(self._calls.explain_session(session_id))

    def explain_block(self, key: str) -> CacheView:
        """The same of the block with that key, in hexadecimal."""
        return self._run(self._calls.explain_block(key))

    def placements(self, session_id: str) -> list[Placement]:
        """Where it is cheapest to go on with, for `mcp_vllm.routing`."""
        return self._run(self._calls.placements(session_id)).placements

    def delete(self, session_id: str) -> None:
        self._run(self._calls.delete(session_id))

    def copy(self, session_id: str, *, to: str) -> Transfer:
        return self._run(self._calls.transfer(session_id, "/copy", to))

    def move(self, session_id: str, *, to: str) -> Transfer:
        return self._run(self._calls.transfer(session_id, "/move", to))

    def prefetch(self, session_id: str) -> Transfer:
        """Let the agent fetch the session from its peers."""
        return self._run(self._calls.prefetch(session_id))

    def fork(self, session_id: str, new_id: str) -> SessionSummary:
        return self._run(self._calls.change(session_id, "/fork", ForkRequest(new_id)))

    def pin(self, session_id: str, ttl_s: float) -> SessionSummary:
        return self._run(self._calls.change(session_id, "/pin", PinRequest(ttl_s)))

    def unpin(self, session_id: str) -> SessionSummary:
        return self._run(self._calls.change(session_id, "/unpin"))

    def park(self, session_id: str) -> SessionSummary:
        return self._run(self._calls.change(session_id, "/park"))

    def wake(self, session_id: str) -> SessionSummary:
        return self._run(self._calls.change(session_id, "/wake"))

    def drain(self) -> Iterator[DrainStep]:
        """Move every session of the agent (of all tenants) to its peers; one step a session."""
        with _no_answer(), self._http.stream("POST", "/v1/drain") as response:
            if response.is_error:
                _check(response.status_code, response.read())
            for line in response.iter_lines():
                yield msgspec.json.decode(line, type=DrainStep)

    def export(self, session_id: str, path: Path) -> None:
        """Write the session to a file; one that an interrupted export left is completed."""
        unfinished = UnfinishedFile(path)
        headers = unfinished.headers()
        url = self._calls.path(session_id, "/export")
        with _no_answer(), self._http.stream("GET", url, headers=headers) as response:
            if response.is_error:
                _check(response.status_code, response.read())
            with unfinished.open(response) as file:
                for piece in response.iter_bytes(PIECE_BYTES):
                    file.write(piece)
        unfinished.complete()

    def import_file(self, path: Path, session_id: str | None = None) -> SessionSummary:
        """Take a session over from a file, under its own name or another of this tenant. Where the
        connection breaks, it goes on from what had come, `IMPORT_ATTEMPTS` times in all."""
        query, offset = self._calls.import_query(session_id), 0
        with path.open("rb") as file:
            for attempt in range(IMPORT_ATTEMPTS):
                file.seek(offset)
                try:
                    with _no_answer():
                        response = self._http.post(
                            IMPORT_PATH, params={**query, "offset": str(offset)}, content=file
                        )
                    return _Call("POST", "", SessionSummary).result(response)
                except ApiError as error:
                    if error.status or attempt == IMPORT_ATTEMPTS - 1:
                        raise
                time.sleep(IMPORT_PAUSE_S * 2**attempt)
                offset = self._run(self._calls.upload_state(query)).received
        raise AssertionError("the last attempt returns or raises")

    @property
    def _http(self) -> httpx.Client:
        if self._agent is None:
            raise ApiError(0, f"{self._endpoint} is a stage: sessions need the URL of an agent")
        return self._agent

    def _run(self, call: _Call[_T]) -> _T:
        with _no_answer():
            response = self._http.request(call.method, call.path, content=call.content)
        return call.result(response)


class AsyncMCPClient:
    """`MCPClient` for asyncio. Use it as an async context manager, or await `close`."""

    def __init__(
        self,
        endpoint: str = DEFAULT_URL,
        tenant: str = DEFAULT_TENANT,
        token: str | None = None,
        **options: Any,
    ) -> None:
        """As for MCPClient; `options` go to httpx.AsyncClient."""
        self._http = httpx.AsyncClient(base_url=endpoint, **(_defaults(token) | options))
        self._calls = _Calls(tenant)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def sessions(self) -> list[SessionSummary]:
        """All of the tenant's, by name."""
        page = await self._run(self._calls.sessions(None))
        found = self._calls.own(page)
        while page.next is not None:
            page = await self._run(self._calls.sessions(page.next))
            found += self._calls.own(page)
        return found

    async def session(self, session_id: str) -> SessionSummary:
        return await self._run(self._calls.session(session_id))

    async def explain_session(self, session_id: str) -> CacheView:
        return await self._run(self._calls.explain_session(session_id))

    async def explain_block(self, key: str) -> CacheView:
        return await self._run(self._calls.explain_block(key))

    async def placements(self, session_id: str) -> list[Placement]:
        """Where it is cheapest to go on with, for `mcp_vllm.routing`."""
        return (await self._run(self._calls.placements(session_id))).placements

    async def delete(self, session_id: str) -> None:
        await self._run(self._calls.delete(session_id))

    async def copy(self, session_id: str, *, to: str) -> Transfer:
        return await self._run(self._calls.transfer(session_id, "/copy", to))

    async def move(self, session_id: str, *, to: str) -> Transfer:
        return await self._run(self._calls.transfer(session_id, "/move", to))

    async def prefetch(self, session_id: str) -> Transfer:
        return await self._run(self._calls.prefetch(session_id))

    async def fork(self, session_id: str, new_id: str) -> SessionSummary:
        return await self._run(self._calls.change(session_id, "/fork", ForkRequest(new_id)))

    async def pin(self, session_id: str, ttl_s: float) -> SessionSummary:
        return await self._run(self._calls.change(session_id, "/pin", PinRequest(ttl_s)))

    async def unpin(self, session_id: str) -> SessionSummary:
        return await self._run(self._calls.change(session_id, "/unpin"))

    async def park(self, session_id: str) -> SessionSummary:
        return await self._run(self._calls.change(session_id, "/park"))

    async def wake(self, session_id: str) -> SessionSummary:
        return await self._run(self._calls.change(session_id, "/wake"))

    async def drain(self) -> AsyncIterator[DrainStep]:
        with _no_answer():
            async with self._http.stream("POST", "/v1/drain") as response:
                if response.is_error:
                    _check(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    yield msgspec.json.decode(line, type=DrainStep)

    async def export(self, session_id: str, path: Path) -> None:
        unfinished = UnfinishedFile(path)
        url, headers = self._calls.path(session_id, "/export"), unfinished.headers()
        with _no_answer():
            async with self._http.stream("GET", url, headers=headers) as response:
                if response.is_error:
                    _check(response.status_code, await response.aread())
                with unfinished.open(response) as file:
                    async for piece in response.aiter_bytes(PIECE_BYTES):
                        await asyncio.to_thread(file.write, piece)
        unfinished.complete()

    async def import_file(self, path: Path, session_id: str | None = None) -> SessionSummary:
        query, offset = self._calls.import_query(session_id), 0
        with path.open("rb") as file:
            for attempt in range(IMPORT_ATTEMPTS):
                file.seek(offset)
                try:
                    with _no_answer():
                        response = await self._http.post(
                            IMPORT_PATH,
                            params={**query, "offset": str(offset)},
                            content=_pieces(file),
                        )
                    return _Call("POST", "", SessionSummary).result(response)
                except ApiError as error:
                    if error.status or attempt == IMPORT_ATTEMPTS - 1:
                        raise
                await asyncio.sleep(IMPORT_PAUSE_S * 2**attempt)
                offset = (await self._run(self._calls.upload_state(query))).received
        raise AssertionError("the last attempt returns or raises")

    async def _run(self, call: _Call[_T]) -> _T:
        with _no_answer():
            response = await self._http.request(call.method, call.path, content=call.content)
        return call.result(response)


def _defaults(token: str | None) -> dict[str, Any]:
    """Options of httpx that both clients have unless told otherwise."""
    timeout = httpx.Timeout(READ_S, connect=CONNECT_S)
    return {"timeout": timeout, "auth": _Bearer(token) if token else None}


class _Bearer(httpx.Auth):
    """Presents the token."""

    def __init__(self, token: str) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


async def _pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
        yield piece


@contextlib.contextmanager
def _no_answer() -> Iterator[None]:
    """Turn httpx's errors into ApiError."""
    try:
        yield
    except httpx.HTTPError as error:
        raise ApiError(0, f"the agent does not answer: {error or type(error).__name__}") from error


def _check(status: int, body: bytes) -> None:
    if status < 400:
        return
    try:
        message = msgspec.json.decode(body, type=Failure).error
    except (msgspec.MsgspecError, UnicodeDecodeError):
        message = body[:500].decode(errors="replace")
    raise ApiError(status, message)
