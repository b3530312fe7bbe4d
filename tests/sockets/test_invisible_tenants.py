"""Another tenant's session answers exactly as one that does not exist, on every route there is."""

import json
from contextlib import asynccontextmanager

import aiohttp
import pytest
from simulated import address, running_agent
from simulated_security import Issuer, SecuredSettings
from simulated_sessions import engine_with_session
from yarl import URL

from mcp_vllm.agent import wire
from mcp_vllm.agent.access_rules import RULES
from mcp_vllm.session.api import BLOCK_CACHE, ONE
from mcp_vllm.session.manifest import SessionKey

EVERYTHING = "sessions:read sessions:write blocks:read"
BODIES = {
    "copy": {"to": "127.0.0.1:9"},
    "move": {"to": "127.0.0.1:9"},
    "fork": {"new_id": "stolen"},
    "pin": {"ttl_s": 60},
    "pull": wire.encode(wire.SessionPull("x")),
    "release": wire.encode(wire.SessionRelease("x")),
}
PER_SESSION = sorted(route for route in RULES if route[1].startswith(ONE))
HEADERS = [{}, {"Range": "bytes=1-"}, {"If-Match": '"x"'}, {"Accept-Encoding": "gzip"}]


def test_every_route_that_names_a_session_is_looked_at():
    assert len(PER_SESSION) == 16
    # A block's route is looked at in test_cache_explain.py.
    others = {path for _, path in RULES if not path.startswith(ONE)} - {BLOCK_CACHE}
    assert not [path for path in others if "{" in path]


@asynccontextmanager
async def agents(tmp_path, parked: bool):
    """Calls at an agent that has acme's session: awake, or parked."""
    issuer = Issuer(tmp_path)
    config = SecuredSettings(token_keys=issuer.file).config(
        parking_folder=tmp_path / "parked", tenants={"sessions": 2}
    )
    async with (
        running_agent(config, tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path, session_id="secret", tenant="acme"),
        aiohttp.ClientSession() as http,
    ):

        async def call(method, path, token, body=None, headers=None):
            """(Status, reason, headers but the date, body)."""
            url = URL(f"http://{address(agent)}{path}", encoded=True)
            data = body if isinstance(body, bytes) else json.dumps(body) if body else None
            sent = {"Authorization": f"Bearer {token}", **(headers or {})}
            async with http.request(method, url, headers=sent, data=data) as answer:
                kept = sorted((k, v) for k, v in answer.headers.items() if k != "Date")
                return answer.status, answer.reason, kept, await answer.read()

        if parked:
            own = issuer.token(EVERYTHING, tenant="acme")
            assert (await call("POST", "/v1/sessions/acme/secret/park", own))[0] == 200
        yield agent, issuer, call


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("extra", ["", " admin"])
async def test_every_operation_on_anothers_session_answers_as_on_none(tmp_path, parked, extra):
    async with agents(tmp_path, parked) as (agent, issuer, call):
        mallory = issuer.token(EVERYTHING + extra, tenant="mallory")
        for method, route in PER_SESSION:
            body = BODIES.get(route.rpartition("/")[2])
            for headers in HEADERS:
                there, *nowhere = [
                    await call(
                        method,
                        route.format(tenant=tenant, session_id=session_id),
                        mallory,
                        body,
                        headers,
                    )
                    for tenant, session_id in (
                        ("acme", "secret"),
                        ("acme", "nobody"),
                        ("mallory", "secret"),
                        ("nobody", "secret"),
                    )
                ]
                assert there[0] >= 400, route
                assert all(there == answer for answer in nowhere), (method, route, headers)
                assert b"acme" not in there[3]
        assert agent._context.sessions.get(SessionKey("acme", "secret")).parked == parked
        own = issuer.token(EVERYTHING, tenant="acme")
        assert (await call("GET", "/v1/sessions/acme/secret", own))[0] == 200


async def test_nothing_else_there_is_tells_of_anothers_session(tmp_path):
    """The same answers before and after another tenant has a session; no counts of all."""
    async with agents(tmp_path, False) as (agent, issuer, call):
        mallory = issuer.token(f"admin {EVERYTHING}", tenant="mallory")
        own = issuer.token(EVERYTHING, tenant="acme")
        asked = sorted((m, p) for m, p in RULES if "{" not in p)

        async def answers():
            return {route: await call(*route, mallory) for route in asked}

        with_session = await answers()
        assert (await call("DELETE", "/v1/sessions/acme/secret", own))[0] == 204
        assert not len(agent._context.sessions)
        assert await answers() == with_session
        assert with_session["GET", "/v1/sessions"][3] == b'{"sessions":[]}'
        for refused in (("GET", "/metrics"), ("POST", "/v1/drain"), ("POST", "/v1/blocks/lookup")):
            assert with_session[refused][0] == 403


async def test_an_archive_of_anothers_session_is_refused_alike_whether_it_is_here_or_not(tmp_path):
    async with agents(tmp_path, False) as (_, issuer, call):
        own = issuer.token(EVERYTHING, tenant="acme")
        mallory = issuer.token(EVERYTHING, tenant="mallory")
        archive = (await call("GET", "/v1/sessions/acme/secret/export", own))[3]
        there = await call("POST", "/v1/sessions/import", mallory, archive)
        await call("DELETE", "/v1/sessions/acme/secret", own)
        assert await call("POST", "/v1/sessions/import", mallory, archive) == there
        assert there[0] == 403
