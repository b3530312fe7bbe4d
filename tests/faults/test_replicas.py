"""A host is lost (kill -9 of its agent): a copy of its sessions is at a peer, whole, and a request
at a third host is given all of it."""

import asyncio
import contextlib

from restartable_agent import (
    EXPECTED,
    NUM_CHUNKS,
    RestartableAgent,
    contents,
    give_session,
    is_there,
    started,
    until_awaited,
)
from simulated import SimulatedEngine, settings
from simulated_sessions import ALICE, call

from mcp_vllm.config import Config


def three_agents(folder) -> list[RestartableAgent]:
    """A, whose sessions have one copy, and its peers B and C; all know one another."""
    agents = [RestartableAgent(folder, name, settings(codec="raw")) for name in "abc"]
    for agent in agents:
        peers = tuple(each.address for each in agents if each is not agent)
        copies = agent._config.replication.model_copy(update={"replicas": 1})
        agent._config = Config.model_validate(
            agent._config.model_dump() | {"peers": peers, "replication": copies.model_dump()}
        )
    return agents


async def holder_among(agents: list[RestartableAgent]) -> RestartableAgent | None:
    """The agent that has the session whole."""
    for agent in agents:
        status, shown = await call(agent, "GET", ALICE)
        if status == 200 and shown["held_chunks"] == NUM_CHUNKS:
            return agent
    return None


async def test_a_lost_host_takes_no_context_with_it(tmp_path):
    a, *others = three_agents(tmp_path)
    with started(a, *others):
        await give_session(a)
        await until_awaited(lambda: holder_among(others), "the copy")
        a.kill()
        holder = await holder_among(others)
        assert holder is not None
        assert await contents(holder, ALICE) == EXPECTED
        third = next(agent for agent in others if agent is not holder)
        await finds_and_loads_everything(third)
        if not await is_there(third):
            assert (await call(third, "POST", f"{ALICE}/prefetch"))[0] == 200
        assert await contents(third, ALICE) == EXPECTED


async def finds_and_loads_everything(agent: RestartableAgent) -> None:
    names = list(EXPECTED)
    with SimulatedEngine(agent.socket, num_chunks=NUM_CHUNKS) as engine:
        await engine.connected()
        engine.prepare("r", "alice")
        await engine.finds("r", names)
        done = await engine.load("r", names, range(NUM_CHUNKS))
        assert not done.failed
        assert [engine.payload(n) for n in range(NUM_CHUNKS)] == list(EXPECTED.values())


async def test_the_copies_of_a_lost_host_get_copies_themselves(tmp_path):
    a, *others = three_agents(tmp_path)
    with started(a, *others):
        await give_session(a)
        await until_awaited(lambda: holder_among(others), "the copy")
        a.kill()

        async def both() -> bool:
            return all([await holder_among([agent]) for agent in others])

        await until_awaited(both, "a copy of the copy")


async def test_a_peer_lost_while_it_is_given_a_copy_costs_nothing_and_the_next_gets_it(tmp_path):
    a, *others = three_agents(tmp_path)
    with started(a, *others):
        giving = asyncio.create_task(give_session(a))
        with contextlib.suppress(AssertionError):
            await until_awaited(lambda: has_some(others[0]), "the first chunks")
        others[0].kill()
        await giving
        await until_awaited(lambda: holder_among(others[1:]), "the copy at the other")
        assert await contents(a, ALICE) == EXPECTED
        assert await contents(others[1], ALICE) == EXPECTED


async def has_some(agent: RestartableAgent) -> bool:
    return (await call(agent, "GET", "/healthz"))[1]["chunks"] > 0
