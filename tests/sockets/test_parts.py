"""The agent's parts one by one: breaker, landing slots, encoder."""

import asyncio
import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
from simulated import GROUPS, LAYOUT, pattern, settings, until

from mcp_vllm.agent import breaker as breaker_module
from mcp_vllm.agent import encoder as encoder_module
from mcp_vllm.agent.breaker import BACKOFF_MAX_S, BACKOFF_MIN_S, FAILURES_TO_OPEN, Breaker
from mcp_vllm.agent.context import MAX_NAMESPACES, AgentContext
from mcp_vllm.agent.encoder import Encoder
from mcp_vllm.agent.landing import MIN_SLOTS, LandingSlots
from mcp_vllm.codec import decode_frame_into
from mcp_vllm.session.fingerprint import Fingerprint
from mcp_vllm.store.ram import Chunk, ChunkKey


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    for _ in range(FAILURES_TO_OPEN):
        assert breaker.allow()
        breaker.failed()
    assert not breaker.is_closed
    return breaker


def test_a_breaker_opens_after_some_failures_in_a_row() -> None:
    breaker = Breaker(Clock())
    for _ in range(5):
        breaker.failed()
        breaker.succeeded()
    assert breaker.is_closed
    assert not opened(Clock()).allow()


def test_an_open_breaker_allows_one_trial_after_its_back_off() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now_s += BACKOFF_MIN_S - 0.01
    assert not breaker.allow()
    clock.now_s += 0.01
    assert [breaker.allow() for _ in range(3)] == [True, False, False]
    breaker.succeeded()
    assert breaker.is_closed
    assert breaker.allow()


def test_each_failed_trial_doubles_the_back_off_up_to_a_bound() -> None:
    clock = Clock()
    breaker = opened(clock)
    expected_s = BACKOFF_MIN_S
    for _ in range(8):
        clock.now_s += expected_s
        assert breaker.allow()
        breaker.failed()
        expected_s = min(2 * expected_s, BACKOFF_MAX_S)
        clock.now_s += expected_s - 0.01
        assert not breaker.allow()
        clock.now_s += 0.01 - expected_s
    assert expected_s == breaker_module.BACKOFF_MAX_S


def test_many_requests_that_fail_at_once_are_one_outage() -> None:
    clock = Clock()
    breaker = opened(clock)
    for _ in range(20):
        breaker.failed()
    clock.now_s += BACKOFF_MIN_S
    assert breaker.allow()


async def test_a_taken_slot_is_waited_for() -> None:
    slots = LandingSlots(1000, 1)
    assert (slots.num_slots, slots.slot_bytes % 4096) == (MIN_SLOTS, 0)
    taken = await slots.acquire(MIN_SLOTS + 1)  # as many as there are
    assert sorted(taken) == list(range(MIN_SLOTS))
    waiting = asyncio.create_task(slots.acquire())
    await asyncio.sleep(0)
    assert not waiting.done()
    slots.release([taken[2]])
    assert await asyncio.wait_for(waiting, 5) == [taken[2]]
    slots.close()


@pytest.mark.parametrize("released", [[0, 0], [-1], [MIN_SLOTS], [2**40], [1]])
async def test_only_a_taken_slot_can_be_released(released: list[int]) -> None:
    slots = LandingSlots(1000, 1)
    assert await slots.acquire() == [0]
    with pytest.raises(ValueError, match="not in use"):
        slots.release(released)
    slots.close()


async def test_a_cancelled_wait_takes_no_slot() -> None:
    slots = LandingSlots(1000, 1)
    taken = await slots.acquire(MIN_SLOTS)
    waiting = asyncio.create_task(slots.acquire())
    await asyncio.sleep(0)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    slots.release(taken)
    for _ in range(MIN_SLOTS):
        await asyncio.wait_for(slots.acquire(), 5)
    slots.close()


@pytest.fixture
def context() -> Iterator[AgentContext]:
    context = AgentContext(settings())
    yield context
    context.close()


def add(context: AgentContext, number: int, size: int = 4096) -> tuple[ChunkKey, Chunk]:
    name = ChunkKey(b"n", number.to_bytes(8, "big"))
    chunk = Chunk(LAYOUT, size, raw=pattern(number, size))
    assert context.store.put(name, chunk)
    return name, chunk


@contextlib.asynccontextmanager
async def in_background(encoder: Encoder):
    task = asyncio.create_task(encoder.run())
    yield
    assert not task.done(), "the background encoder has ended"
    task.cancel()


async def test_two_who_ask_for_a_frame_share_one_encoding(
    context: AgentContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = encoder_module.encode_frame
    monkeypatch.setattr(encoder_module, "encode_frame", lambda *a: calls.append(a) or real(*a))
    encoder = Encoder(context)
    name, chunk = add(context, 1)
    raw = chunk.raw
    assert raw is not None
    one, two = await asyncio.gather(encoder.frame(name, chunk), encoder.frame(name, chunk))
    assert one is two is await encoder.frame(name, chunk) is chunk.frame
    assert len(calls) == 1
    assert chunk.raw is None
    out = bytearray(4096)
    decode_frame_into(one, memoryview(out), key=name.key)
    assert out == raw.tobytes()
    context.store.check_integrity()


async def test_one_who_gives_up_does_not_spoil_the_encoding_for_the_other(
    context: AgentContext,
) -> None:
    encoder = Encoder(context)
    name, chunk = add(context, 1)
    hasty = asyncio.create_task(encoder.frame(name, chunk))
    patient = asyncio.create_task(encoder.frame(name, chunk))
    await asyncio.sleep(0)
    hasty.cancel()
    assert await asyncio.wait_for(patient, 5) == chunk.frame


async def test_chunks_are_encoded_once_the_engines_are_idle(context: AgentContext) -> None:
    encoder = Encoder(context)
    async with in_background(encoder):
        context.activity.begin()
        _, chunk = add(context, 1)
        encoder.notify()
        for _ in range(20):  # the encoder has had its turns
            await asyncio.sleep(0)
        assert chunk.frame is None
        context.activity.end()
        await until(lambda: chunk.frame is not None)
        _, later = add(context, 2)
        encoder.notify()
        await until(lambda: later.frame is not None)


async def test_chunks_are_encoded_at_work_too_when_raw_ones_crowd_the_budget(
    context: AgentContext,
) -> None:
    context.store.budget_bytes = 100_000
    encoder = Encoder(context)
    async with in_background(encoder):
        context.activity.begin()
        chunks = [add(context, number)[1] for number in range(10)]
        encoder.notify()
        share = encoder_module.RAW_SHARE * 100_000
        await until(lambda: context.store.size().raw_held_bytes <= share)
        assert chunks[0].frame is not None, "who waited longest goes first"
        assert chunks[-1].frame is None


async def test_a_chunk_that_cannot_be_encoded_is_dropped_and_the_rest_goes_on(
    context: AgentContext,
) -> None:
    encoder = Encoder(context)
    broken = ChunkKey(b"n", b"k" * 1000)  # longer than a frame's key may be
    context.store.put(broken, Chunk(LAYOUT, 100, raw=np.zeros(100, np.uint8)))
    _, fine = add(context, 2)
    async with in_background(encoder):
        encoder.notify()
        await until(lambda: fine.frame is not None)
        assert broken not in context.store


def test_fingerprints_are_bounded_and_the_latest_stay(context: AgentContext) -> None:
    first = Fingerprint({"model": "first"})
    context.learn_engine(first, GROUPS)
    for number in range(MAX_NAMESPACES):
        context.learn_engine(first, GROUPS)
        context.learn_engine(Fingerprint({"model": str(number)}), GROUPS)
    assert len(context.fingerprints) == MAX_NAMESPACES
    assert first.digest in context.fingerprints
    assert context.codecs.engine(first.digest).layouts
    forgotten = Fingerprint({"model": "0"})
    assert not context.codecs.engine(forgotten.digest).layouts
