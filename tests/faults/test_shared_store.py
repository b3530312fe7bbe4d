"""The shared store's server, a real one, is killed (-9) in the middle of loads and comes back
empty: what is lost is a miss, and no byte is wrong."""

import asyncio
from contextlib import ExitStack

import pytest
from redis_server import RedisServer, needs_redis, running_redis
from simulated import SimulatedEngine, keys, running_agent, settings, until

from mcp_vllm.store.shared import SharedTier, tier

pytestmark = needs_redis
ROUNDS, CHUNKS = 12, 30


@pytest.fixture(autouse=True)
def _tries_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier, "RETRY_MIN_S", 0.02)
    monkeypatch.setattr(tier, "RETRY_MAX_S", 0.05)


async def write(engine: SimulatedEngine, shared: SharedTier, names: list[bytes], at: int) -> None:
    writes = shared.writes
    for row in range(CHUNKS):
        engine.fill(row, at + row)
    await engine.store(names, range(CHUNKS))
    await until(lambda: shared.writes == writes + CHUNKS, "the writes")


async def load_and_kill(
    engine: SimulatedEngine, shared: SharedTier, names: list[bytes], server: RedisServer, after: int
) -> set[int]:
    """Load them all; the server is killed when so many have come. Returns the rows that landed."""
    engine.rows[:] = 0
    request_id = f"r {names[0].hex()}"
    engine.prepare(request_id)
    assert await engine.lookup(request_id, names) == [1] * CHUNKS
    reads = shared.reads
    load = asyncio.create_task(engine.load(request_id, names, range(CHUNKS)))
    await until(lambda: shared.reads >= reads + after or load.done(), "the first reads")
    server.kill()
    done = await load
    assert set(done.causes) <= {"gone"}
    return set(range(CHUNKS)) - done.failed


async def test_a_server_killed_and_restarted_during_loads_costs_hits_and_nothing_else(tmp_path):
    with running_redis(tmp_path) as server, ExitStack() as stack:
        config = settings(shared={"url": server.url}, lookup_ms=1000)
        async with (
            running_agent(config, tmp_path / "w.sock") as writer,
            running_agent(config, tmp_path / "r.sock") as reader,
        ):
            tiers = [agent._context.tiers.shared for agent in (writer, reader)]
            first, second = (
                stack.enter_context(SimulatedEngine(tmp_path / f"{name}.sock")) for name in "wr"
            )
            await first.connected()
            await second.connected()
            num_landed = 0
            for number in range(ROUNDS):
                names = keys(*range(number * CHUNKS, (number + 1) * CHUNKS))
                await write(first, tiers[0], names, number * CHUNKS)
                landed = await load_and_kill(second, tiers[1], names, server, number % 4)
                for row in landed:
                    assert second.payload(row) == first.payload(row)
                num_landed += len(landed)
                server.start()
                await until(lambda: all(each.is_up for each in tiers), "the server")
            assert 0 < num_landed < ROUNDS * CHUNKS, "it was killed too early or too late each time"
