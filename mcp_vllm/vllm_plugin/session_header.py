"""ASGI middleware: the headers `X-Session-Id` and `X-Tenant-Id` name the session and the tenant, as
`kv_transfer_params` would.

Added to vLLM's API server by the flags when connector `mcp` is on. The body is rewritten only when
one of the headers is there. A session that the body names stays; a tenant that a header names wins
over the body's, so that a gateway which sets the header decides.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

SESSION_HEADER = b"x-session-id"
TENANT_HEADER = b"x-tenant-id"
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


class SessionHeaderMiddleware:
    """Pure ASGI, so that streamed answers pass through untouched."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        session = _session(scope)
        if session:
            receive = await _with_session(scope, receive, session)
        await self._app(scope, receive, send)


def _session(scope: Message) -> dict[str, str]:
    if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
        return {}
    headers = dict(scope["headers"])
    named = {"session_id": headers.get(SESSION_HEADER), "tenant": headers.get(TENANT_HEADER)}
    return {name: value.decode("latin-1") for name, value in named.items() if value}


async def _with_session(scope: Message, receive: Receive, session: dict[str, str]) -> Receive:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return _replay([message], receive)
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    rewritten = add_session(bytes(body), session)
    scope["headers"] = [
        (name, str(len(rewritten)).encode() if name == b"content-length" else value)
        for name, value in scope["headers"]
    ]
    return _replay([{"type": "http.request", "body": rewritten, "more_body": False}], receive)


def add_session(body: bytes, session: dict[str, str]) -> bytes:
    """`body` with the session and the tenant in its `kv_transfer_params`; unchanged when it is no
    JSON object."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return body  # the server says what is wrong with it
    if not isinstance(request, dict):
        return body
    params = request.get("kv_transfer_params")
    if params is None:
        params = {}
    if not isinstance(params, dict):
        return body
    tenant = {name: session[name] for name in ("tenant",) if name in session}
    request["kv_transfer_params"] = {**session, **params, **tenant}
    return json.dumps(request).encode()


def _replay(messages: list[Message], receive: Receive) -> Receive:
    async def replayed() -> Message:
        return messages.pop(0) if messages else await receive()

    return replayed
