"""Requests to one peer: addresses, credentials, bounded answers. Used by `peer` and its link."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from mcp_vllm.agent import wire
from mcp_vllm.agent.link_meter import LinkMeter
from mcp_vllm.agent.security import AgentSecurity
from mcp_vllm.agent.wire import WireError
from mcp_vllm.session.manifest import SessionKey

# Of what a peer says, this much goes into a log line.
MAX_DETAIL_CHARS = 500

# What a request to a peer raises when it does not work out.
FAULTS = (aiohttp.ClientError, OSError, TimeoutError, WireError)


@dataclass(frozen=True)
class Member:
    """An address of an agent: "HOST:PORT", and the name that its certificate must bear where that
    is not the host."""

    name: str
    tls_name: str | None = None


class PeerHttp:
    """How one peer is asked.

    Args:
        http: shared client session.
        stall_s: a connection, and each read from it, may take that long.
        security: our certificate and token for it.
    """

    def __init__(
        self, member: Member, http: aiohttp.ClientSession, stall_s: float, security: AgentSecurity
    ) -> None:
        self._member = member
        self._http = http
        self._stall_s = stall_s
        self._security = security
        # aiohttp's own read timeout is not used: when the end of a body arrives while reading is
        # paused, it stays armed on the pooled connection and fails a later request (3.14).
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_s, connect=stall_s)

    def get(self, path: str):  # type: ignore[no-untyped-def]
        """`path` is written as in `wire`, percent-encoded."""
        return self._http.get(self._url(path), **self._options())

    def post(self, path: str, request: msgspec.Struct):  # type: ignore[no-untyped-def]
        return self._http.post(self._url(path), data=wire.encode(request), **self._options())

    async def body(self, response: aiohttp.ClientResponse) -> bytes:
        await check_status(response)
        body = bytearray()
        async for part in response.content.iter_any():
            body += part
            if len(body) > wire.MAX_REQUEST_BYTES:
                raise WireError("oversized", "an answer larger than any answer may be")
        return bytes(body)

    async def read(
        self, response: aiohttp.ClientResponse, size: int, meter: LinkMeter | None = None
    ) -> bytes:
        """Exactly `size` bytes of the body; TimeoutError when none comes for `stall_s`.

        `meter` is told of each part as it comes, and of the wait for one that does not.
        """
        parts: list[bytes] = []
        left = size
        while left:
            begun_s = time.perf_counter()
            try:
                async with asyncio.timeout(self._stall_s):
                    part = await response.content.read(left)
            except (asyncio.CancelledError, TimeoutError):
                if meter is not None:
                    meter.note_silence(time.perf_counter() - begun_s)
                raise
            if meter is not None and part:
                meter.note_payload(len(part), time.perf_counter() - begun_s)
            if not part:
                raise WireError("closed", "the stream was cut off")
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def end_of(self, response: aiohttp.ClientResponse) -> None:
        """Read the end of the body, so that the connection can be used again."""
        async with asyncio.timeout(self._stall_s):
            if await response.content.read(1):
                raise WireError("malformed", "bytes after the last frame")

    def _url(self, path: str) -> URL:
        return URL(f"{self._security.scheme}://{self._member.name}{path}", encoded=True)

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"timeout": self._timeout, "allow_redirects": False}
        if self._member.tls_name is not None and self._security.tls is not None:
            options["server_hostname"] = self._member.tls_name
        return {**options, **self._security.request_options()}


def session_path(key: SessionKey, operation: str) -> str:
    names = (quote(name, safe="") for name in (key.tenant, key.session_id))
    return f"/v1/sessions/{'/'.join(names)}/{operation}"


async def check_status(response: aiohttp.ClientResponse) -> None:
    """Raises WireError unless it is 200, or 204."""
    if response.status not in (200, 204):
        detail = (await response.content.read(MAX_DETAIL_CHARS)).decode(errors="replace")
        raise WireError(f"http {response.status}", detail)


def cause_of(error: Exception) -> str:
    """A short word for metrics."""
    if isinstance(error, WireError):
        return error.cause
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "connect"
    if isinstance(error, aiohttp.ClientResponseError):
        return "malformed"
    return "closed"
