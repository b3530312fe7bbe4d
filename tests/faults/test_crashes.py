"""Agents killed (-9) at the worst moments: what was whole stays whole somewhere, and nothing
half-written is ever served.

A session that lies in a parking folder survives its agent; one that lies in memory only does not,
and never has a half-life elsewhere. Real processes, real sockets; no engine.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from restartable_agent import (
    EXPECTED,
    NUM_CHUNKS,
    RestartableAgent,
    contents,
    decoded,
    expected,
    give_session,
    is_there,
    started,
    until_awaited,
)
from simulated import settings, until
from simulated_sessions import ALICE, call
from throttle import Throttle

from mcp_vllm.client import ApiError, AsyncMCPClient

# More than a system's socket buffers hold: they outlive a process.
MANY_CHUNKS = 800
FAST, SLOW = 1e9, 1e6  # bytes a second
HALFWAY = 12  # chunks of a transfer


class Pair:
    """Agents A and B, peers of each other over links that can be slowed; each with a parking
    folder."""

    def __init__(self, folder: Path, to_a: Throttle, to_b: Throttle) -> None:
        self.folders = {name: folder / f"parked-{name}" for name in "ab"}
        self.a, self.b = (
            RestartableAgent(
                folder, name, settings(peer.address, codec="raw", parking_folder=self.folders[name])
            )
            for name, peer in (("a", to_b), ("b", to_a))
        )
        self.to_a, self.to_b = to_a, to_b
        to_a.set_target(self.a.address)
        to_b.set_target(self.b.address)

    def other(self, agent: RestartableAgent) -> RestartableAgent:
        return self.b if agent is self.a else self.a

    def link_to(self, agent: RestartableAgent) -> Throttle:
        return self.to_a if agent is self.a else self.to_b

    def folder_of(self, agent: RestartableAgent) -> Path:
        return self.folders["a" if agent is self.a else "b"]

    def restart(self, agent: RestartableAgent) -> None:
        agent.kill()
        agent.start()

    async def move(self, source: RestartableAgent) -> int:
        """The answer's status; 0 when there was none."""
        to = self.link_to(self.other(source)).address
        with contextlib.suppress(aiohttp.ClientError, OSError):
            return (await call(source, "POST", f"{ALICE}/move", {"to": to}))[0]
        return 0


@contextlib.asynccontextmanager
async def pair(folder: Path) -> AsyncIterator[Pair]:
    to_a, to_b = Throttle("127.0.0.1:1", FAST), Throttle("127.0.0.1:1", FAST)
    async with to_a.running(), to_b.running():
        agents = Pair(folder, to_a, to_b)
        with started(agents.a, agents.b):
            yield agents


async def is_whole(agent: RestartableAgent) -> bool:
    """Whether it has the session. That what it has is all of it, byte for byte, is asserted."""
    status, shown = await call(agent, "GET", ALICE)
    if status == 404:
        return False
    assert await contents(agent, ALICE) == EXPECTED, shown
    return True


async def received_chunks(agent: RestartableAgent) -> int:
    return (await call(agent, "GET", "/healthz"))[1]["chunks"]


async def move_halfway(agents: Pair) -> "asyncio.Task[int]":
    """A move from A to B that is under way, and has brought some chunks."""
    agents.to_a.bytes_s = SLOW
    moving = asyncio.create_task(agents.move(agents.a))

    async def halfway() -> bool:
        assert not moving.done(), "the move was faster than the test"
        return HALFWAY <= await received_chunks(agents.b) < NUM_CHUNKS

    await until_awaited(halfway, "half of the session")
    return moving


async def test_the_source_is_killed_in_the_middle_of_a_move_of_a_parked_session(tmp_path):
    async with pair(tmp_path) as agents:
        await give_session(agents.a)
        assert (await call(agents.a, "POST", f"{ALICE}/park"))[0] == 200
        moving = await move_halfway(agents)
        agents.a.kill()
        assert await moving == 0
        await is_whole(agents.b)
        agents.a.start()
        agents.to_a.bytes_s = FAST
        assert (await call(agents.a, "GET", ALICE))[1]["parked"]
        assert await is_whole(agents.a)
        assert await agents.move(agents.a) == 200
        assert [await is_whole(agents.a), await is_whole(agents.b)] == [False, True]


@pytest.mark.slow
async def test_the_source_is_killed_in_the_middle_of_a_move_of_what_is_in_memory_only(tmp_path):
    """Memory does not outlive the process; the receiver shows all of it or nothing."""
    async with pair(tmp_path) as agents:
        await give_session(agents.a)
        moving = await move_halfway(agents)
        agents.a.kill()
        assert await moving == 0
        agents.a.start()
        assert not await is_there(agents.a)
        await is_whole(agents.b)


async def test_the_target_is_killed_in_the_middle_of_a_move(tmp_path):
    async with pair(tmp_path) as agents:
        await give_session(agents.a)
        moving = await move_halfway(agents)
        agents.b.kill()
        assert await moving == 502
        assert await is_whole(agents.a)
        agents.b.start()
        agents.to_a.bytes_s = FAST
        assert not await is_there(agents.b)
        # The breaker lets a peer try again after a while.
        await until_awaited(lambda: moved(agents), "the second move")
        assert [await is_whole(agents.a), await is_whole(agents.b)] == [False, True]


async def moved(agents: Pair) -> bool:
    return await agents.move(agents.a) == 200


async def test_the_target_is_killed_after_the_source_has_released(tmp_path):
    async with pair(tmp_path) as agents:
        await give_session(agents.a)
        assert await agents.move(agents.a) == 200
        assert not await is_there(agents.a)
        agents.restart(agents.b)
        assert (await call(agents.b, "GET", ALICE))[1]["parked"]
        assert await is_whole(agents.b)


def is_writing(folder: Path) -> bool:
    return bool(list(folder.glob("*.part")))


async def stopped_while_writing(agent: RestartableAgent, folder: Path, task: asyncio.Task) -> bool:
    """Stop the agent when it writes a file there; whether it was in the middle of it."""
    while not is_writing(folder) and not task.done():  # noqa: ASYNC110  another process's event
        await asyncio.sleep(0)
    agent.pause()
    return is_writing(folder)


async def paused_while_writing(agents: Pair, agent: RestartableAgent, begin) -> asyncio.Task:
    """Start an operation that writes a parked session there, and stop the agent in the middle of
    the file; tried again when the file was done before the signal came."""
    folder = agents.folder_of(agent)
    for _ in range(50):
        task = asyncio.create_task(begin())
        if await stopped_while_writing(agent, folder, task):
            return task
        agent.resume()
        await task
        await call(agent, "POST", f"{ALICE}/wake")
    raise AssertionError("never in the middle of the file")


@pytest.mark.parametrize(
    "earlier",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["the first file", "over an earlier one"],
)
async def test_the_agent_is_killed_while_it_writes_a_parked_session(tmp_path, earlier):
    async with pair(tmp_path) as agents:
        agent, folder = agents.a, agents.folders["a"]
        await give_session(agent)
        if earlier:
            for operation in ("park", "wake"):
                assert (await call(agent, "POST", f"{ALICE}/{operation}"))[0] == 200
        task = await paused_while_writing(
            agents, agent, lambda: call(agent, "POST", f"{ALICE}/park")
        )
        there_before = bool(list(folder.glob("*.mcps")))
        assert there_before or not earlier
        agent.kill()
        with pytest.raises((aiohttp.ClientError, OSError)):
            await task
        agent.start()
        assert not list(folder.glob("*.part"))
        assert await is_there(agent) == there_before
        assert await is_whole(agent) == there_before


@pytest.mark.slow
async def test_the_target_is_killed_while_it_writes_what_was_moved_to_it(tmp_path):
    """The source has not released yet: it does so only when the target would survive."""
    async with pair(tmp_path) as agents:
        await give_session(agents.a)
        agents.folders["b"].mkdir()

        moving = asyncio.create_task(agents.move(agents.a))
        unfinished = await stopped_while_writing(agents.b, agents.folders["b"], moving)
        agents.b.kill()
        status = await moving
        agents.b.start()
        whole = [await is_whole(agents.a), await is_whole(agents.b)]
        assert any(whole)
        if unfinished:
            assert (status, whole) == (502, [True, False])


@pytest.mark.slow
async def test_the_agent_is_killed_while_it_sends_an_export(tmp_path):
    async with pair(tmp_path) as agents:
        agent = agents.a
        await give_session(agent, MANY_CHUNKS)
        assert (await call(agent, "POST", f"{ALICE}/park"))[0] == 200
        file, part = tmp_path / "alice.mcps", tmp_path / "alice.mcps.part"
        agents.to_a.bytes_s = SLOW
        async with AsyncMCPClient(f"http://{agents.to_a.address}") as client:
            exporting = asyncio.create_task(client.export("alice", file))
            await until(lambda: part.exists() and part.stat().st_size > 100_000, "half a file")
            agent.kill()
            with pytest.raises(ApiError):
                await exporting
            assert not file.exists()
            half = part.read_bytes()
            status, answer = await call(agents.b, "POST", "/v1/sessions/import", data=half)
            assert (status, "too early" in answer["error"]) == (400, True)
            assert not await is_there(agents.b)
            agent.start()
            agents.to_a.bytes_s = FAST
            await client.export("alice", file)
        assert file.read_bytes()[: len(half)] == half, "it went on where it stopped"
        assert decoded(file.read_bytes()) == expected(MANY_CHUNKS)


async def crash_rounds(agents: Pair, seed: int, rounds: int) -> None:
    """Moves, parking and waking, with either agent killed at any moment or none."""
    chance = random.Random(seed)
    await give_session(agents.a)
    assert (await call(agents.a, "POST", f"{ALICE}/park"))[0] == 200
    for _ in range(rounds):
        holders = [each for each in (agents.a, agents.b) if await is_there(each)]
        source = chance.choice(holders)
        operation = chance.choice(["move", "move", "move", "park", "wake"])
        agents.link_to(source).bytes_s = chance.choice([FAST, 20e6])
        if operation == "move":
            working = asyncio.create_task(agents.move(source))
        else:
            working = asyncio.create_task(call(source, "POST", f"{ALICE}/{operation}"))
        await asyncio.sleep(chance.uniform(0, 0.5))
        victim = chance.choice([source, agents.other(source)])
        victim.kill()
        with contextlib.suppress(aiohttp.ClientError, OSError):
            await working
        victim.start()
        agents.link_to(source).bytes_s = FAST
        whole = [await is_whole(agents.a), await is_whole(agents.b)]
        assert any(whole), f"lost in a {operation}"
        assert not is_writing(agents.folder_of(victim))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
async def test_at_any_of_many_moments(tmp_path, seed):
    async with pair(tmp_path) as agents:
        await crash_rounds(agents, seed, rounds=20)
