"""Chunks land in batches: whole, each once, slots back, and no thread idle while others queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.lander import BYTES_AT_ONCE, CHUNKS_AT_ONCE, Arrival, Lander
from mcp_vllm.agent.landing import LandingSlots
from mcp_vllm.codec import ChecksumError, CodecError

SIZE = 1000


class Engine:
    """Notes what it is told, and gives the slots back."""

    def __init__(self, slots: LandingSlots) -> None:
        self.slots = slots
        self.batches: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    async def announce(self, filled: Sequence[tuple[int, int]]) -> None:
        self.batches.append([index for index, _ in filled])
        for index, slot in filled:
            self.content[index] = bytes(self.slots.buffer(slot, SIZE))
        self.slots.release([slot for _, slot in filled])


class Load:
    """What became of each chunk."""

    def __init__(self) -> None:
        self.landed: list[int] = []
        self.damaged: dict[int, CodecError] = {}

    def arrival(self, index: int, size: int = SIZE, damage: bool = False) -> Arrival:
        def fill(out: memoryview) -> None:
            if damage:
                raise ChecksumError("damaged")
            out[:] = bytes([index]) * size

        def damaged(error: CodecError) -> None:
            self.damaged[index] = error

        return Arrival(index, size, fill, lambda: self.landed.append(index), damaged)


async def in_pool(function: Callable[..., object], *args: object) -> object:
    return await asyncio.to_thread(function, *args)


@asynccontextmanager
async def landing(
    threads: int = 1, slot_bytes: int = SIZE, num_slots: int = 8
) -> AsyncIterator[tuple[Callable[[asyncio.TaskGroup], Lander], Engine]]:
    slots = LandingSlots(slot_bytes, num_slots * 4096 * -(-slot_bytes // 4096))
    context = cast(AgentContext, SimpleNamespace(codec_threads=threads, in_pool=in_pool))
    engine = Engine(slots)
    yield lambda tasks: Lander(context, slots, tasks, engine.announce), engine
    taken = await slots.acquire(slots.num_slots)
    assert len(taken) == slots.num_slots  # all came back
    slots.close()


async def put_all(lander: Lander, arrivals: Sequence[Arrival]) -> None:
    for arrival in arrivals:
        await lander.room()
        lander.put(arrival)


async def test_all_land_once_and_damaged_ones_do_not() -> None:
    load = Load()
    async with landing() as (make, engine), asyncio.TaskGroup() as tasks:
        await put_all(make(tasks), [load.arrival(n, damage=n % 5 == 0) for n in range(40)])
    whole = [n for n in range(40) if n % 5]
    assert sorted(load.landed) == whole
    assert sorted(load.damaged) == [n for n in range(40) if n % 5 == 0]
    assert engine.content == {n: bytes([n]) * SIZE for n in whole}
    assert max(map(len, engine.batches)) <= CHUNKS_AT_ONCE


@pytest.mark.parametrize(
    ("threads", "waiting", "size", "first"),
    [(1, 8, SIZE, 4), (1, 2, SIZE, 2), (4, 8, SIZE, 2), (8, 4, SIZE, 1), (1, 8, BYTES_AT_ONCE, 1)],
)
async def test_a_batch_is_a_threads_share(
    threads: int, waiting: int, size: int, first: int
) -> None:
    load = Load()
    async with landing(threads, slot_bytes=size) as (make, engine), asyncio.TaskGroup() as tasks:
        await put_all(make(tasks), [load.arrival(n, size) for n in range(waiting)])
    assert len(engine.batches[0]) == first


async def test_what_was_told_counts_though_telling_was_cut_off() -> None:
    load = Load()

    async def stalls(filled: Sequence[tuple[int, int]]) -> None:
        await engine.announce(filled)
        await asyncio.sleep(60)

    async def cut_off(make: Callable[[asyncio.TaskGroup], Lander]) -> None:
        async with asyncio.timeout(0.2), asyncio.TaskGroup() as tasks:
            lander = make(tasks)
            cast(Any, lander)._announce = stalls
            await put_all(lander, [load.arrival(n) for n in range(3)])

    async with landing() as (make, engine):
        with pytest.raises(TimeoutError):
            await cut_off(make)
    assert engine.batches == [[0, 1, 2]]
    assert load.landed == [0, 1, 2]
