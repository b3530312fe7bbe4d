import json
import subprocess
import sys
from typing import Any

import pytest

from mcp_vllm.vllm_plugin.session_header import SessionHeaderMiddleware, add_session

SESSION = [(b"x-session-id", b"alice")]


async def through(
    messages: list[dict[str, Any]],
    headers: list[tuple[bytes, bytes]],
    path: str = "/v1/completions",
    method: str = "POST",
    kind: str = "http",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The scope and the messages that the application sees."""
    seen: dict[str, Any] = {}
    received: list[dict[str, Any]] = []

    async def app(scope, receive, send):
        seen.update(scope)
        received.extend([await receive() for _ in range(len(messages))])

    waiting = [*messages, *[{"type": "http.disconnect"}] * len(messages)]

    async def receive():
        return waiting.pop(0)

    async def send(message):
        raise AssertionError("the middleware sends nothing of its own")

    scope = {"type": kind, "method": method, "path": path, "headers": headers}
    await SessionHeaderMiddleware(app)(scope, receive, send)
    return seen, received


def request(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


async def test_the_header_names_the_session_and_the_length_follows() -> None:
    body = json.dumps({"prompt": "Grüße", "n": 1}).encode()
    length = (b"content-length", str(len(body)).encode())
    scope, received = await through([request(body)], [*SESSION, (b"x-tenant-id", b"acme"), length])
    sent = json.loads(received[0]["body"])
    assert sent == {
        "prompt": "Grüße",
        "n": 1,
        "kv_transfer_params": {"session_id": "alice", "tenant": "acme"},
    }
    assert dict(scope["headers"])[b"content-length"] == str(len(received[0]["body"])).encode()


async def test_a_body_in_parts_is_put_together_and_what_follows_passes_through() -> None:
    parts = [request(b'{"prompt"', True), request(b': "hi"', True), request(b"}")]
    _, received = await through(parts, SESSION)
    assert json.loads(received[0]["body"])["kv_transfer_params"] == {"session_id": "alice"}
    assert received[0]["more_body"] is False
    assert received[1]["type"] == "http.disconnect"


@pytest.mark.parametrize(
    "case",
    [
        {"headers": []},
        {"headers": [(b"x-session-id", b"")]},
        {"headers": SESSION, "path": "/v1/models"},
        {"headers": SESSION, "method": "GET"},
        {"headers": SESSION, "kind": "websocket"},
    ],
)
async def test_every_other_request_passes_untouched(case: dict[str, Any]) -> None:
    messages = [request(b'{"a": 1', True), request(b"}")]
    _, received = await through(messages, **case)
    assert received == messages


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_reported() -> None:
    _, received = await through([request(b'{"a"', True), {"type": "http.disconnect"}], SESSION)
    assert received[0] == {"type": "http.disconnect"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[1, 2]",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"kv_transfer_params": {"session_id": "bob"}}',
        b'{"kv_transfer_params": "a string, which the server refuses"}',
        b'{"kv_transfer_params": []}',
    ],
    ids=range(9),
)
def test_a_body_that_is_no_request_or_names_a_session_stays_as_it_is(body: bytes) -> None:
    assert add_session(body, {"session_id": "alice"}) == body


async def test_a_tenant_without_a_session_is_named_too() -> None:
    _, received = await through([request(b"{}")], [(b"x-tenant-id", b"acme")])
    assert json.loads(received[0]["body"]) == {"kv_transfer_params": {"tenant": "acme"}}


def test_other_transfer_parameters_are_kept_and_the_headers_tenant_wins() -> None:
    body = json.dumps(
        {"kv_transfer_params": {"tenant": "mine", "x": 1, "session_id": "bob"}}
    ).encode()
    changed = json.loads(add_session(body, {"session_id": "alice", "tenant": "header's"}))
    params = {"session_id": "bob", "tenant": "header's", "x": 1}
    assert changed["kv_transfer_params"] == params
    body = b'{"kv_transfer_params": null}'
    changed = json.loads(add_session(body, {"session_id": "alice"}))
    assert changed["kv_transfer_params"] == {"session_id": "alice"}


def test_everything_without_vllm_imports_without_vllm() -> None:
    """In a process where importing vLLM or torch fails."""
    modules = [
        "mcp_vllm.vllm_plugin.session_header",
        "mcp_vllm.link.client",
        "mcp_vllm.link.supervisor",
        "mcp_vllm.agent.server",
        "mcp_vllm.store.ram",
        "mcp_vllm.session.manifest",
    ]
    code = f"import sys; sys.modules.update(vllm=None, torch=None); import {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
