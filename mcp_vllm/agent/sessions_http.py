"""The session API: `/v1/sessions/...` and `/v1/drain` (docs/api.md). Bodies and answers are JSON;
archives and the steps of a drain are streamed."""

from __future__ import annotations

import hashlib
import heapq
import math
import re
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TypeVar
from urllib.parse import quote, unquote

import msgspec
from aiohttp import web

from mcp_vllm.agent import openapi, wire
from mcp_vllm.agent.access import note_session, present_principal, visible
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.session_error import SessionError
from mcp_vllm.agent.sessions import Sessions
from mcp_vllm.agent.uploads import Upload, UploadError, Uploads
from mcp_vllm.session.api import (
    ARCHIVE_TYPE,
    MAX_PAGE,
    ONE,
    Failure,
    ForkRequest,
    PinRequest,
    SessionList,
    SessionSummary,
    TransferRequest,
    UploadState,
)
from mcp_vllm.session.archive import encode_manifest
from mcp_vllm.session.manifest import Manifest, SessionKey, SessionNameError, checked_name

MAX_BODY_BYTES = 64 << 10
MAX_OFFSET_DIGITS = 18
UPLOAD_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class SessionsHttp:
    """The routes. Owned by the agent's event loop."""

    def __init__(self, context: AgentContext, sessions: Sessions) -> None:
        self._context = context
        self._sessions = sessions
        self._uploads = Uploads()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/sessions", self._list),
            web.post("/v1/sessions/import", self._import),
            web.get("/v1/sessions/import", self._upload_state),
            web.get(ONE, self._show),
            web.delete(ONE, self._delete),
            web.get(f"{ONE}/manifest", self._manifest),
            web.get(f"{ONE}/export", self._export),
            web.post(f"{ONE}/copy", self._copy),
            web.post(f"{ONE}/move", self._move),
            web.post(f"{ONE}/pull", self._pull),
            web.post(f"{ONE}/release", self._release),
            web.post(f"{ONE}/prefetch", self._prefetch),
            web.post(f"{ONE}/fork", self._fork),
            web.post(f"{ONE}/pin", self._pin),
            web.post(f"{ONE}/unpin", self._unpin),
            web.post(f"{ONE}/park", self._park),
            web.post(f"{ONE}/wake", self._wake),
            web.post("/v1/drain", self._drain),
            web.get("/v1/openapi.json", self._openapi),
        ]

    async def _list(self, request: web.Request) -> web.Response:
        asking, limit = present_principal(), _page_size(request)
        after = _place_before(request)
        keys = (each.key for each in self._context.sessions if asking.sees(each.key.tenant))
        page = heapq.nsmallest(limit + 1, (key for key in keys if after is None or key > after))
        summaries = [self._summary(self._sessions.get(key)) for key in page[:limit]]
        more = len(page) > limit
        return json_answer(SessionList(summaries, _place(page[limit - 1]) if more else None))

    async def _show(self, request: web.Request) -> web.Response:
        return self._answer(self._sessions.get(session_key(request)))

    async def _delete(self, request: web.Request) -> web.Response:
        self._sessions.delete(session_key(request))
        return web.Response(status=204)

    async def _manifest(self, request: web.Request) -> web.Response:
        key = session_key(request)
        manifest = await self._sessions.wake(key)
        sizes = self._sessions.sizes(manifest)
        offer = wire.SessionOffer(
            encode_manifest(manifest), list(sizes.keys()), list(sizes.values())
        )
        return web.Response(body=wire.encode(offer), content_type="application/msgpack")

    async def _export(self, request: web.Request) -> web.StreamResponse:
        """From the byte that a `Range: bytes=N-` names, if `If-Match` names this very archive."""
        manifest = await self._sessions.wake(session_key(request))
        tag = hashlib.blake2b(encode_manifest(manifest), digest_size=16).hexdigest()
        expected = request.headers.get("If-Match", f'"{tag}"')
        if expected != f'"{tag}"':
            raise SessionError(412, "the session has changed since: export it from its start")
        start = _range_start(request)
        pieces = _skipping(start, self._sessions.files.export(manifest))
        headers = {"Content-Type": ARCHIVE_TYPE, "ETag": f'"{tag}"'}
        return await _stream(request, pieces, headers, status=206 if start else 200)

    async def _import(self, request: web.Request) -> web.Response:
        owner = None
        if {"tenant", "session_id"} <= set(request.query):
            owner = checked_key(request.query["tenant"], request.query["session_id"])
            note_session(owner)
        pieces, tenant = aiter(request.content.iter_any()), present_principal().tenant
        who, files = _upload(request), self._sessions.files
        if who is None:
            manifest = await files.import_archive(pieces, owner, tenant)
        else:
            upload = self._take_upload(who, request)
            try:
                manifest = await files.import_archive(pieces, owner, tenant, upload)
            except SessionError:
                raise
            except BaseException:  # the connection broke, in the middle of the body
                if upload.is_waiting:
                    self._uploads.pause(who, upload)
                raise
        note_session(manifest.key)
        return self._answer(manifest)

    async def _upload_state(self, request: web.Request) -> web.Response:
        who = _upload(request)
        if who is None:
            raise SessionError(400, "upload: which one?")
        return json_answer(UploadState(self._uploads.received(who)))

    def _take_upload(self, who: tuple[str, str], request: web.Request) -> Upload:
        text = request.query.get("offset", "0")
        if not text.isdecimal() or len(text) > MAX_OFFSET_DIGITS:
            raise SessionError(400, f"offset: a number of bytes, not {text[:20]!r}")
        try:
            return self._uploads.take(who, int(text))
        except UploadError as error:
            raise SessionError(409, str(error)) from error

    async def _copy(self, request: web.Request) -> web.Response:
        asked = await json_body(request, TransferRequest)
        return json_answer(await self._sessions.copy(session_key(request), asked.to))

    async def _move(self, request: web.Request) -> web.Response:
        asked = await json_body(request, TransferRequest)
        return json_answer(await self._sessions.move(session_key(request), asked.to))

    async def _pull(self, request: web.Request) -> web.Response:
        asked = wire.decode(wire.SessionPull, await request.read())
        if not 0 <= asked.bytes_s < math.inf:
            raise SessionError(400, "bytes_s: no rate")
        pulled = await self._sessions.pull(session_key(request), asked)
        return web.Response(body=wire.encode(pulled), content_type="application/msgpack")

    async def _release(self, request: web.Request) -> web.Response:
        asked = wire.decode(wire.SessionRelease, await request.read())
        self._sessions.release_replica(session_key(request), asked.agent_id)
        return web.Response(status=204)

    async def _prefetch(self, request: web.Request) -> web.Response:
        return json_answer(await self._sessions.prefetch(session_key(request)))

    async def _fork(self, request: web.Request) -> web.Response:
        asked = await json_body(request, ForkRequest)
        return self._answer(self._sessions.fork(session_key(request), asked.new_id))

    async def _pin(self, request: web.Request) -> web.Response:
        asked = await json_body(request, PinRequest)
        return await self._after(request, lambda key: self._sessions.pin(key, asked.ttl_s))

    async def _unpin(self, request: web.Request) -> web.Response:
        return await self._after(request, self._sessions.unpin)

    async def _park(self, request: web.Request) -> web.Response:
        await self._sessions.park(session_key(request))
        return self._answer(self._sessions.get(session_key(request)))

    async def _wake(self, request: web.Request) -> web.Response:
        return self._answer(await self._sessions.wake(session_key(request)))

    async def _drain(self, request: web.Request) -> web.StreamResponse:
        async def lines() -> AsyncIterator[bytes]:
            async for step in self._sessions.drain():
                yield msgspec.json.encode(step) + b"\n"

        return await _stream(request, lines(), {"Content-Type": "application/x-ndjson"})

    async def _openapi(self, request: web.Request) -> web.Response:
        body = msgspec.json.encode(openapi.document())
        return web.Response(body=body, content_type="application/json")

    async def _after(
        self, request: web.Request, operation: Callable[[SessionKey], None]
    ) -> web.Response:
        key = session_key(request)
        operation(key)
        return self._answer(self._sessions.get(key))

    def _answer(self, manifest: Manifest) -> web.Response:
        return json_answer(self._summary(manifest))

    def _summary(self, manifest: Manifest) -> SessionSummary:
        held = self._context.held(manifest).values()
        return SessionSummary(
            tenant=manifest.key.tenant,
            session_id=manifest.key.session_id,
            namespace=manifest.namespace.hex(),
            num_tokens=manifest.num_tokens,
            turns=manifest.turns,
            loss=manifest.loss or "none",
            parked=manifest.parked,
            created_s=manifest.created_s,
            last_used_s=manifest.last_used_s,
            num_chunks=manifest.num_chunks,
            held_chunks=len(held),
            raw_bytes=sum(chunk.raw_bytes for chunk in held),
            held_bytes=sum(chunk.held_bytes for chunk in held),
            pinned_until_s=self._context.pins.until_s(manifest.key),
            replica=bool(manifest.replica_of),
            holders=self._sessions.holders(manifest.key),
        )


@web.middleware
async def session_errors(request: web.Request, handler):  # type: ignore[no-untyped-def]
    """Turn a SessionError into an answer."""
    try:
        return await handler(request)
    except SessionError as error:
        body = msgspec.json.encode(Failure(str(error)))
        return web.Response(status=error.status, body=body, content_type="application/json")


def session_key(request: web.Request) -> SessionKey:
    """The session in the path, as far as the asker may know of it. Raises SessionError(400)."""
    names = request.match_info
    return visible(checked_key(names["tenant"], names["session_id"]))


def _upload(request: web.Request) -> tuple[str, str] | None:
    """Who makes which upload, where one is named. Raises SessionError(400)."""
    name = request.query.get("upload")
    if name is None:
        return None
    if not UPLOAD_NAME.fullmatch(name):
        raise SessionError(400, "upload: up to 64 letters, digits, - and _")
    return present_principal().name, name


def _page_size(request: web.Request) -> int:
    text = request.query.get("limit", str(MAX_PAGE))
    if not text.isdecimal() or not 0 < int(text) <= MAX_PAGE:
        raise SessionError(400, f"limit: a number from 1 to {MAX_PAGE}, not {text[:20]!r}")
    return int(text)


def _place(key: SessionKey) -> str:
    """Where a page ends, as `_place_before` reads it: names may hold any printable text."""
    return "/".join(quote(name, safe="") for name in (key.tenant, key.session_id))


def _place_before(request: web.Request) -> SessionKey | None:
    place = request.query.get("after")
    if place is None:
        return None
    tenant, _, session_id = place.partition("/")
    return checked_key(unquote(tenant), unquote(session_id))


def checked_key(tenant: str, session_id: str) -> SessionKey:
    """A session as a request names it. Raises SessionError."""
    try:
        return SessionKey(checked_name("tenant", tenant), checked_name("session id", session_id))
    except SessionNameError as error:
        raise SessionError(400, str(error)) from error


async def json_body(
    request: web.Request, kind: type[_Struct], max_bytes: int = MAX_BODY_BYTES
) -> _Struct:
    """The body as such a structure. Raises SessionError: 400 or 413."""
    body = await request.read()
    if len(body) > max_bytes:
        raise SessionError(413, f"a body of {len(body)} bytes is too large")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SessionError(400, f"{kind.__name__}: {error}") from error


def json_answer(answer: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


def _range_start(request: web.Request) -> int:
    """Where a `Range` header wants to begin; 0 without one."""
    try:
        wanted = request.http_range
    except ValueError as error:
        raise SessionError(416, str(error)) from error
    if wanted.stop is not None or (wanted.start or 0) < 0:
        raise SessionError(416, "an archive is sent from some byte to its end")
    return wanted.start or 0


async def _skipping(num_bytes: int, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces without the first bytes."""
    async for piece in pieces:
        if num_bytes < len(piece):
            yield piece[num_bytes:]
        num_bytes = max(0, num_bytes - len(piece))


async def _stream(
    request: web.Request,
    pieces: AsyncIterator[bytes],
    headers: Mapping[str, str],
    status: int = 200,
) -> web.StreamResponse:
    """Send the pieces; what fails before the first one is an ordinary error."""
    first = await anext(pieces, b"")
    response = web.StreamResponse(status=status, headers=headers)
    await response.prepare(request)
    await response.write(first)
    async for piece in pieces:
        await response.write(piece)
    await response.write_eof()
    return response
