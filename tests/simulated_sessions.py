"""Agents with sessions, for tests of what can be done with them; no vLLM."""

import json
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
from simulated import (
    SimulatedEngine,
    acquainted,
    address,
    key,
    keys,
    running_agent,
    settings,
    until,
)
from throttle import Throttle

from mcp_vllm.link import protocol
from mcp_vllm.session.manifest import SessionKey

NAMES = [*keys(0, 1, 2), key(0, group=1)]
CHAINS = [NAMES[:3], NAMES[3:]]
ALICE = "/v1/sessions/default/alice"


async def call(agent, method: str, path: str, body: object = None, data: bytes | None = None):
    """(Status, parsed answer or text)."""
    async with (
        aiohttp.ClientSession() as http,
        http.request(method, f"http://{address(agent)}{path}", json=body, data=data) as response,
    ):
        raw = await response.read()
        kind = response.content_type
        return response.status, json.loads(raw) if kind == "application/json" else raw


@asynccontextmanager
async def two_agents(folder: Path, **agent: object):
    """(A, B), peers of each other: B is started first on a port of its own choosing."""
    async with AsyncExitStack() as stack:
        link = Throttle("127.0.0.1:1", 1e9)
        await stack.enter_async_context(link.running())
        b = await stack.enter_async_context(
            running_agent(settings(link.address, **agent), folder / "b.sock")
        )
        a = await stack.enter_async_context(
            running_agent(settings(address(b), **agent), folder / "a.sock")
        )
        link.set_target(address(a))
        await acquainted(a, b)
        yield a, b, link


@asynccontextmanager
async def engine_with_session(
    agent, folder: Path, name: str = "a", session_id: str = "alice", tenant: str = "default"
):
    with SimulatedEngine(folder / f"{name}.sock") as engine:
        await engine.connected()
        for chunk_id in range(4):
            engine.fill(chunk_id, chunk_id)
        await engine.store(NAMES, [0, 1, 2, 3], tenant=tenant)
        await turn(agent, engine, session_id, tenant=tenant)
        yield engine


async def turn(
    agent, engine, session_id: str = "alice", chains=CHAINS, tenant: str = "default"
) -> None:
    before = agent._context.sessions.get(SessionKey(tenant, session_id))
    request_id = f"{tenant} {session_id} {before.turns if before else 0}"
    engine.prepare(request_id, session_id, tenant)
    engine.link.send(protocol.Finish(request_id, list(chains), 48))
    await until(
        lambda: agent._context.sessions.get(SessionKey(tenant, session_id)) is not before,
        "the turn",
    )
