"""Who gets through to an agent's handlers, what the others are told, and what is recorded."""

import base64
import json
import logging
import time
from contextlib import asynccontextmanager

import aiohttp
import jwt
import pytest
from simulated import address, running_agent, settings
from simulated_security import Issuer, SecuredSettings, audit_lines, public_pem
from simulated_sessions import ALICE, engine_with_session
from yarl import URL

from mcp_vllm.agent import wire
from mcp_vllm.agent.access_rules import RULES
from mcp_vllm.agent.server import Agent
from mcp_vllm.session.manifest import SessionKey

BLOCKS = wire.encode(wire.LookupRequest(wire.WIRE_VERSION, bytes(16), [bytes(36)]))
OPERATIONS = [
    ("GET", "", None),
    ("DELETE", "", None),
    ("GET", "/export", None),
    ("GET", "/manifest", None),
    ("POST", "/copy", {"to": "127.0.0.1:9"}),
    ("POST", "/move", {"to": "127.0.0.1:9"}),
    ("POST", "/prefetch", None),
    ("POST", "/fork", {"new_id": "stolen"}),
    ("POST", "/pin", {"ttl_s": 60}),
    ("POST", "/unpin", None),
    ("POST", "/park", None),
    ("POST", "/wake", None),
]
EVERYTHING = "sessions:read sessions:write blocks:read"


class Caller:
    """Sends requests to one agent."""

    def __init__(self, agent: Agent, http: aiohttp.ClientSession) -> None:
        self.agent = agent
        self._http = http

    async def __call__(self, method, path, token=None, body=None, data=None):
        """(Status, body) of the answer."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}

        url = URL(f"http://{address(self.agent)}{path}", encoded=True)
        async with self._http.request(
            method, url, headers=headers, json=body, data=data
        ) as response:
            return response.status, await response.read()


@pytest.fixture
def issuer(tmp_path):
    return Issuer(tmp_path)


@asynccontextmanager
async def secured(tmp_path, issuer, **agent):
    chosen = SecuredSettings(token_keys=issuer.file, audit_file=tmp_path / "audit")
    async with (
        running_agent(chosen.config(**agent), tmp_path / "a.sock") as running,
        aiohttp.ClientSession() as http,
    ):
        yield Caller(running, http)


def forged(header: dict, issuer: Issuer) -> str:
    def part(value):
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    payload = {"sub": "x", "aud": "mcp-vllm", "exp": int(time.time()) + 60, "scope": "admin"}
    return f"{part(header)}.{part(payload)}."


def bad_tokens(issuer: Issuer, stranger: Issuer) -> dict[str, str]:
    now_s = int(time.time())
    confused = jwt.encode(
        {"sub": "x", "aud": "mcp-vllm", "exp": now_s + 60, "scope": "admin"},
        base64.b64encode(public_pem(issuer.key).encode()),
        headers={"kid": "a"},
    )
    return {
        "expired": issuer.token("admin", exp=now_s - 60),
        "wrong audience": issuer.token("admin", aud="elsewhere"),
        "wrong algorithm": confused,
        "unknown kid": Issuer.token(stranger, "admin"),
        "malformed": "not-a-token",
        "neither a tenant nor admin": issuer.token("sessions:read"),
    }


async def test_every_bad_token_gets_one_answer_and_its_own_line(tmp_path, issuer, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "other").mkdir()
    stranger = Issuer(tmp_path / "other", kid="zz")
    tokens = bad_tokens(issuer, stranger)
    async with secured(tmp_path, issuer) as call:
        answers = {await call("GET", "/v1/sessions", token) for token in tokens.values()}
        answers.add(await call("GET", "/v1/sessions", forged({"alg": "none", "kid": "a"}, issuer)))
        answers.add(await call("GET", "/v1/sessions"))
    assert answers == {(401, b'{"error":"a valid token or certificate is needed"}')}
    reasons = {line["reason"] for line in audit_lines(tmp_path / "audit")}
    assert reasons >= {*tokens, "no credentials"}
    said = caplog.text + (tmp_path / "audit").read_text()
    for reason in reasons:
        assert reason in caplog.text
    for token in tokens.values():
        assert token not in said
        assert token.rpartition(".")[2] not in said or len(token) < 20


async def test_the_log_does_not_grow_with_refusals_but_the_audit_has_each(tmp_path, issuer, caplog):
    async with secured(tmp_path, issuer) as call:
        for _ in range(5):
            await call("GET", "/v1/sessions")
    assert len(audit_lines(tmp_path / "audit")) == 5
    assert caplog.text.count("no credentials") == 1


async def test_without_security_settings_nobody_needs_a_token(tmp_path):
    async with (
        running_agent(settings(), tmp_path / "a.sock") as agent,
        aiohttp.ClientSession() as http,
    ):
        call = Caller(agent, http)
        for path in ("/healthz", "/metrics", "/v1/sessions", "/v1/peers", "/v1/hello"):
            assert (await call("GET", path))[0] == 200
        assert (await call("POST", "/v1/blocks/lookup", data=BLOCKS))[0] == 200


async def test_each_route_wants_its_scope(tmp_path, issuer):
    wants = {
        ("GET", "/metrics"): "admin",
        ("GET", "/v1/peers"): "sessions:read",
        ("GET", "/v1/sessions"): "sessions:read",
        ("GET", ALICE): "sessions:read",
        ("GET", f"{ALICE}/export"): "sessions:read",
        ("DELETE", ALICE): "sessions:write",
        ("POST", f"{ALICE}/move"): "sessions:write",
        ("POST", "/v1/sessions/import"): "sessions:write",
        ("GET", "/v1/hello"): "blocks:read",
        ("POST", "/v1/blocks/lookup"): "blocks:read",
        ("POST", "/v1/blocks/fetch"): "blocks:read",
        ("POST", "/v1/directory"): "blocks:read",
        ("GET", f"{ALICE}/manifest"): "blocks:read",
        ("POST", f"{ALICE}/pull"): "blocks:read",
        ("POST", "/v1/drain"): "admin",
    }
    scopes = {"sessions:read", "sessions:write", "blocks:read", "admin"}
    async with secured(tmp_path, issuer) as call:
        assert (await call("GET", "/healthz"))[0] == 200
        for (method, path), scope in wants.items():
            others = " ".join(scopes - {scope})
            without = issuer.token(others, None if scope != "admin" else "default")
            assert (await call(method, path, without))[0] == 403, path
            right = issuer.token(f"admin {scope}")
            assert (await call(method, path, right))[0] not in (401, 403), path


async def test_every_route_has_a_rule_and_every_rule_a_route(tmp_path):
    async with running_agent(settings(), tmp_path / "a.sock") as agent:
        routes = {
            (route.method, route.resource.canonical)
            for route in agent.application.router.routes()
            if route.method != "HEAD"
        }
    assert routes == set(RULES)


async def test_what_does_not_exist_is_told_only_to_those_who_may_ask(tmp_path, issuer):
    async with secured(tmp_path, issuer) as call:
        assert (await call("GET", "/v1/nothing"))[0] == 401
        assert (await call("GET", "/v1/nothing", issuer.token("blocks:read")))[0] == 404
        assert (await call("PUT", "/v1/sessions", issuer.token("blocks:read")))[0] == 405


@pytest.mark.parametrize("parking", [False, True])
async def test_another_tenants_session_answers_as_one_that_does_not_exist(
    tmp_path, issuer, parking
):
    more = {"parking_folder": tmp_path / "parked"} if parking else {}
    async with (
        secured(tmp_path, issuer, **more) as call,
        engine_with_session(call.agent, tmp_path),
    ):
        mallory = issuer.token(EVERYTHING, tenant="mallory")
        for method, operation, body in OPERATIONS:
            there = await call(method, f"{ALICE}{operation}", mallory, body)
            nowhere = await call(method, f"/v1/sessions/mallory/none{operation}", mallory, body)
            elsewhere = await call(method, f"/v1/sessions/default/none{operation}", mallory, body)
            assert there == nowhere == elsewhere, operation
            assert there[0] >= 400
        pulled = wire.encode(wire.SessionPull("x"))
        assert (await call("POST", f"{ALICE}/pull", mallory, data=pulled))[0] == 403
        assert call.agent._context.sessions.get(SessionKey("default", "alice")) is not None
        assert await call("GET", "/v1/sessions", mallory) == (200, b'{"sessions":[]}')
        own = issuer.token(EVERYTHING, tenant="default")
        assert (await call("GET", ALICE, own))[0] == 200
        assert b"alice" in (await call("GET", "/v1/sessions", own))[1]
    lines = audit_lines(tmp_path / "audit")
    attempts = [line for line in lines if line.get("session") == "alice" and line["status"] != 200]
    assert {line["who"] for line in attempts} == {"token:test"}
    assert {line["tenant"] for line in attempts} == {"default"}


@pytest.mark.parametrize(
    "path",
    [
        "mallory/..%2Fdefault%2Falice",
        "mallory%2F..%2Fdefault/alice",
        "mallory/../default/alice",
        "./default/alice",
        "%64efault/alice",
        "default%00/alice",
        "mallory/alice%2Fexport",
        "/default/alice",
        "default;mallory/alice",
        "..%2f..%2fsessions%2fdefault/alice",
    ],
)
async def test_tricks_in_a_path_lead_to_nobodys_session(tmp_path, issuer, path):
    async with (
        secured(tmp_path, issuer) as call,
        engine_with_session(call.agent, tmp_path),
    ):
        mallory = issuer.token(EVERYTHING, tenant="mallory")
        status, body = await call("GET", f"/v1/sessions/{path}", mallory)
        assert status in (400, 404)
        assert b"num_tokens" not in body


async def test_one_tenant_neither_asks_for_blocks_nor_drains_nor_imports_for_others(
    tmp_path, issuer
):
    async with (
        secured(tmp_path, issuer) as call,
        engine_with_session(call.agent, tmp_path),
    ):
        own = issuer.token(f"admin {EVERYTHING}", tenant="default")
        for path in ("/v1/blocks/lookup", "/v1/blocks/fetch", "/v1/directory", "/v1/drain"):
            assert (await call("POST", path, own, data=BLOCKS))[0] == 403
        _, archive = await call("GET", f"{ALICE}/export", own)
        mallory = issuer.token(EVERYTHING, tenant="mallory")
        for query in ("", "?tenant=default&session_id=planted"):
            path = f"/v1/sessions/import{query}"
            status, body = await call("POST", path, mallory, data=archive)
            assert (status, b"another tenant" in body) == (403, True)
        as_own = "/v1/sessions/import?tenant=mallory&session_id=m"
        assert (await call("POST", as_own, mallory, data=archive))[0] == 200
        for_other = "/v1/sessions/import?tenant=bob&session_id=b"
        admin = issuer.token(f"admin {EVERYTHING}")
        assert (await call("POST", for_other, admin, data=archive))[0] == 200
    events = audit_lines(tmp_path / "audit")
    export = next(each for each in events if each.get("operation", "").endswith("/export"))
    assert export["result"] == "ok"
    assert len(archive) <= export["bytes"] < len(archive) + 1000
    imported = [each for each in events if each.get("tenant") == "bob"]
    assert [(each["session"], each["bytes"]) for each in imported] == [("b", len(archive))]


async def test_a_rotated_key_is_accepted_without_a_restart(tmp_path, issuer):
    (tmp_path / "b").mkdir()
    new = Issuer(tmp_path / "b", kid="b")
    async with secured(tmp_path, issuer) as call:
        token = new.token("sessions:read", tenant="default")
        assert (await call("GET", "/v1/sessions", token))[0] == 401
        issuer.publish(issuer, new)
        call.agent._security.reload()
        assert (await call("GET", "/v1/sessions", token))[0] == 200
    events = [each for each in audit_lines(tmp_path / "audit") if each["event"] == "keys"]
    assert [(each["what"], each["result"]) for each in events] == [("token keys", "replaced")]


async def test_served_blocks_are_recorded_with_their_bytes(tmp_path, issuer):
    asked = wire.encode(wire.FetchRequest(wire.WIRE_VERSION, bytes(16), [bytes(36)]))
    async with secured(tmp_path, issuer) as call:
        status, body = await call(
            "POST", "/v1/blocks/fetch", issuer.token("blocks:read"), data=asked
        )
        assert status == 200
    (event,) = audit_lines(tmp_path / "audit")
    assert (event["event"], event["who"]) == ("blocks", "token:test")
    assert event["bytes"] >= len(body)
