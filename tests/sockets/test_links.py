"""Two agents over a link of settable speed: the codec follows the link."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from simulated import (
    CHUNK_BYTES,
    SimulatedEngine,
    address,
    get_json,
    keys,
    running_agent,
    settings,
    until,
)
from throttle import Throttle

from mcp_vllm.link.protocol import GroupLayout

GROUPS = (GroupLayout(((0, CHUNK_BYTES),), "bf16", 64),)
NUM_CHUNKS = 96
SLOW, FAST = 1e6, 1e9


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MCP_VLLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@asynccontextmanager
async def two_hosts(folder: Path, link: float, wire: str = "auto") -> AsyncIterator:
    """(Engine, agent, throttle): the agent reaches one that holds NUM_CHUNKS raw chunks."""
    async with running_agent(settings(codec="raw"), folder / "a.sock") as there:
        with SimulatedEngine(folder / "a.sock", groups=GROUPS, num_chunks=NUM_CHUNKS) as source:
            await source.connected()
            for chunk_id in range(NUM_CHUNKS):
                source.fill(chunk_id, chunk_id)
            await source.store(keys(*range(NUM_CHUNKS)), range(NUM_CHUNKS))
            await until(lambda: len(there._context.store) == NUM_CHUNKS, "the commit")
        await until(lambda: there._context.codecs.speeds(b""), "its codecs' speeds")
        async with Throttle(address(there), link).running() as throttle:
            ours = settings(throttle.address, codec="raw", codecs={"wire": wire})
            async with running_agent(ours, folder / "b.sock") as here:
                await until(lambda: here._context.codecs.speeds(b""), "our codecs' speeds")
                with SimulatedEngine(
                    folder / "b.sock", groups=GROUPS, num_chunks=NUM_CHUNKS
                ) as engine:
                    yield await engine.connected(), here, throttle


async def fetch(engine: SimulatedEngine, first: int, count: int) -> float:
    """Load chunks that are new here; returns raw size over size on the wire."""
    names = keys(*range(first, first + count))
    request = f"request {first}"
    engine.prepare(request)
    assert await engine.lookup(request, names) == [1] * count
    done = await engine.load(request, names, range(first, first + count))
    assert not done.failed
    return done.raw_bytes / done.wire_bytes


async def the_peer(agent):
    (peer,) = (await get_json(agent, "/v1/peers"))["peers"]
    return peer


async def test_the_link_is_measured_as_it_changes_and_the_codec_follows(tmp_path):
    async with two_hosts(tmp_path, SLOW) as (engine, here, throttle):
        assert (await the_peer(here))["mb_s"] is None
        assert await fetch(engine, 0, 12) > 1.2
        slow = await the_peer(here)
        assert slow["up"]
        assert slow["mb_s"] == pytest.approx(SLOW / 1e6, rel=0.5)
        assert slow["codec"] in ("zstd", "lossless")
        assert slow["break_evens"][-1]["above"] == "raw"
        throttle.bytes_s = FAST
        await fetch(engine, 12, 84)
        assert (await the_peer(here))["mb_s"] > 2 * slow["mb_s"]


async def test_a_codec_may_be_fixed(tmp_path):
    async with two_hosts(tmp_path, FAST, wire="zstd") as (engine, _, _):
        assert await fetch(engine, 0, 8) > 1.2
