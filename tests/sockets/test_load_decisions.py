"""A real agent decides for a simulated engine, over a link of settable speed."""

import time
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
    metric,
    running_agent,
    settings,
    until,
)
from throttle import Throttle

from mcp_vllm.link.prefill import PrefillCost
from mcp_vllm.link.protocol import SLOWER, GroupLayout

TOKENS = 128
GROUPS = (GroupLayout(((0, CHUNK_BYTES),), "bf16", 64, tokens=TOKENS),)
NUM_CHUNKS = 64
FAST, SLOW = 1e9, 50e3
LOOKUP_MS = 1000
# The chunks take 31 s over the slow link, and a tenth of a second over a fast one: far enough from
# computing also on a machine that does much else.
COMPUTE_S = 10.0
COMPUTES_SLOWLY = PrefillCost(0.0, COMPUTE_S / (NUM_CHUNKS * TOKENS), 0.0, 1 << 20)
COMPUTES_IN_NO_TIME = PrefillCost(0.0, 1e-8, 0.0, 1 << 20)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MCP_VLLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@asynccontextmanager
async def two_hosts(folder: Path, link: float, **agent: object) -> AsyncIterator:
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
            ours = settings(
                throttle.address, codec="raw", codecs={"wire": "raw"}, lookup_ms=LOOKUP_MS, **agent
            )
            async with running_agent(ours, folder / "b.sock") as here:
                await until(lambda: here._context.codecs.speeds(b""), "our codecs' speeds")
                with SimulatedEngine(
                    folder / "b.sock", groups=GROUPS, num_chunks=NUM_CHUNKS
                ) as engine:
                    yield await engine.connected(), here, throttle


async def look_up(engine: SimulatedEngine, request: str, prefill: PrefillCost | None) -> int:
    """How many chunks the agent says are worth loading."""
    engine.prepare(request, prefill=prefill)
    return sum(await engine.lookup(request, keys(*range(NUM_CHUNKS)), whole=True))


async def load(engine: SimulatedEngine, request: str, first: int = 0):
    names = range(first, NUM_CHUNKS)
    ends = [(number + 1) * TOKENS for number in names]
    return await engine.load(request, keys(*names), names, ends=ends)


def decisions(agent, choice: str) -> float:
    return metric(agent, "mcp_agent_load_decisions_total", choice=choice)


async def test_a_fast_link_is_used_and_its_prediction_recorded(tmp_path):
    async with two_hosts(tmp_path, FAST) as (engine, here, _):
        assert await look_up(engine, "r", COMPUTES_SLOWLY) == NUM_CHUNKS
        assert not (await load(engine, "r")).failed
        report = await get_json(here, "/v1/peers")
        (peer,) = report["peers"]
        assert peer["loads"]["loaded"] == 1
        assert peer["loads"]["predicted_actual"] > 0
        assert 0 < peer["loads"]["saved_s"] < COMPUTE_S
        assert report["prefill_tokens_s"] == pytest.approx(
            NUM_CHUNKS * TOKENS / COMPUTE_S, rel=0.01
        )
        assert decisions(here, "load") == 1
        assert metric(here, "mcp_agent_saved_seconds_total") > 0
        assert metric(here, "mcp_agent_load_prediction_ratio_count", source="peer") == 1


async def test_a_slow_link_is_given_up_in_time_and_then_not_tried(tmp_path):
    async with two_hosts(tmp_path, SLOW) as (engine, here, _):
        assert await look_up(engine, "first", COMPUTES_SLOWLY) == NUM_CHUNKS
        started_s = time.monotonic()
        done = await load(engine, "first")
        taken_s = time.monotonic() - started_s
        assert done.causes[0] == SLOWER
        # What came is the beginning of the context.
        assert done.failed == frozenset(range(NUM_CHUNKS - len(done.failed), NUM_CHUNKS))
        assert taken_s < COMPUTE_S / 2
        assert await look_up(engine, "second", COMPUTES_SLOWLY) < NUM_CHUNKS
        (peer,) = (await get_json(here, "/v1/peers"))["peers"]
        assert peer["up"]
        assert peer["mb_s"] == pytest.approx(SLOW / 1e6, rel=0.7)
        assert peer["loads"]["given_up"] == 1
        assert decisions(here, "recompute") + decisions(here, "partial") == 1
        assert metric(here, "mcp_agent_loads_given_up_total") == 1
        assert metric(here, "mcp_agent_failed_chunks_total", cause=SLOWER) > 0


async def test_a_link_that_was_slow_long_ago_is_tried_again(tmp_path):
    async with two_hosts(tmp_path, SLOW) as (engine, here, throttle):
        await look_up(engine, "first", COMPUTES_SLOWLY)
        await load(engine, "first")
        throttle.bytes_s = FAST
        meter = next(iter(here._peers)).plan.meter
        meter.last_s -= 3600
        assert await look_up(engine, "second", COMPUTES_SLOWLY) == NUM_CHUNKS
        assert not (await load(engine, "second")).failed


async def test_always_means_always(tmp_path):
    async with two_hosts(tmp_path, FAST, load_policy="always") as (engine, here, _):
        assert await look_up(engine, "r", COMPUTES_IN_NO_TIME) == NUM_CHUNKS
        assert not (await load(engine, "r")).failed
        assert decisions(here, "load") == 0


async def test_the_own_store_is_judged_too_once_it_was_measured(tmp_path):
    async with two_hosts(tmp_path, FAST) as (engine, here, _):
        await look_up(engine, "r", COMPUTES_SLOWLY)
        await load(engine, "r")
        assert not (await load(engine, "r")).failed  # from the store, by the same measure
        engine.prepare("s", prefill=COMPUTES_IN_NO_TIME)
        done = await load(engine, "s")
        assert done.causes == (SLOWER,)
        assert len(done.failed) == NUM_CHUNKS
        assert decisions(here, "recompute") == 1


async def test_without_a_measurement_a_peers_word_counts(tmp_path):
    async with two_hosts(tmp_path, SLOW) as (engine, here, throttle):
        plan = next(iter(here._peers)).plan
        await until(lambda: here._context.fingerprints, "the agent to know its engine")
        namespace = next(iter(here._context.fingerprints))
        plan.meter.note_payload(int(SLOW), 1.0)
        assert await look_up(engine, "assumed", None) == 0
        plan.learn_prefill(namespace, PrefillCost(0.0, 1.0, 0.0, 1 << 20))
        throttle.bytes_s = FAST
        plan.meter.note_payload(int(FAST), 1.0)
        assert await look_up(engine, "said", None) == NUM_CHUNKS
