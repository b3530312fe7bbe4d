"""The disk tier in an event loop: order, bounds, and what watchers are told."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from disk_frames import LAYOUT, frame_of, name_of, stored
from simulated import until

from mcp_vllm.store.disk import DiskStore, DiskTier, StoredFrame
from mcp_vllm.store.ram import Chunk, ChunkKey, RamStore
from mcp_vllm.store.tiers import Tiers


@contextlib.asynccontextmanager
async def running(folder: Path, **options: int) -> AsyncIterator[DiskTier]:
    tier = DiskTier(DiskStore(folder, 1 << 20), **options)
    tier.start()
    try:
        yield tier
    finally:
        await tier.close()


@contextlib.contextmanager
def held_back(tier: DiskTier):
    """The writer's thread is busy with something else."""
    go = threading.Event()
    tier._write_pool.submit(go.wait)
    try:
        yield
    finally:
        go.set()


async def test_what_is_put_can_be_got_at_once_and_after_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as tier:
        with held_back(tier):
            tier.put(stored(1))
            waiting = await tier.get(name_of(1))
        assert waiting is not None
        await until(lambda: tier.size().num_chunks, "the write")
        written = await tier.get(name_of(1))
        assert written is not None
        assert waiting.frame == written.frame == frame_of(1, 1000)
        tier.put(stored(2))
    async with running(tmp_path) as tier:
        assert await tier.get(name_of(2)) is not None


async def test_a_full_queue_drops_and_counts(tmp_path: Path) -> None:
    async with running(tmp_path, queue_bytes=3500) as tier:
        with held_back(tier):
            for number in range(10):
                tier.put(stored(number))
            assert tier.queued_bytes == 3000
            assert tier.drops == {"queue": 7}
        await until(lambda: tier.size().num_chunks == 3, "the writes")
        await until(lambda: tier.queued_bytes == 0, "the queue to be empty")
        tier.put(stored(11))
        await until(lambda: tier.size().num_chunks == 4, "the write")


async def test_steps_are_done_in_their_order(tmp_path: Path) -> None:
    async with running(tmp_path) as tier:
        with held_back(tier):
            tier.put(stored(1))
            tier.discard(name_of(1))
            assert tier.find(name_of(1)) is None
            tier.put(stored(1, 500))
            tier.put(stored(2))
            tier.discard(name_of(2))
        await until(lambda: tier.frames_written == 3, "the writes")
        await until(lambda: tier.queued_bytes == 0, "the end of the batch")
        chunk = await tier.get(name_of(1))
        assert chunk is not None
        assert chunk.frame == frame_of(1, 500)
        assert tier.find(name_of(2)) is None
        assert set(tier) == {name_of(1)}


async def test_many_readers_get_their_own(tmp_path: Path) -> None:
    async with running(tmp_path) as tier:
        for number in range(50):
            tier.put(stored(number))
        await until(lambda: tier.size().num_chunks == 50, "the writes")
        chunks = await asyncio.gather(*(tier.get(name_of(n % 50)) for n in range(100)))
        assert [chunk.frame for chunk in chunks if chunk] == [
            frame_of(n % 50, 1000) for n in range(100)
        ]


async def test_watchers_know_what_is_in_any_tier(tmp_path: Path) -> None:
    async with running(tmp_path) as disk:
        ram = RamStore(10_000)
        tiers = Tiers(ram, disk)
        known: set[ChunkKey] = set()
        tiers.watchers.append(lambda n, is_here: (known.add if is_here else known.discard)(n))
        for number in range(40):
            ram.put(name_of(number), Chunk(LAYOUT, 2000, frame=frame_of(number, 1000)))
            assert known == set(tiers)
        await until(lambda: disk.size().num_chunks == 40, "the writes")
        await until(lambda: disk.queued_bytes == 0, "the end of the batch")
        assert known == set(tiers) == {name_of(number) for number in range(40)}
        assert len(ram) < 10
        for _ in range(3):
            tiers.touch([name_of(0)])
        assert await tiers.get(name_of(0)) is ram.get(name_of(0)) is not None
        tiers.discard(name_of(0))
        assert known == set(tiers)
        for number in range(40, 1100):  # more than the disk has room for
            ram.put(name_of(number), Chunk(LAYOUT, 2000, frame=frame_of(number, 1000)))
            await until(lambda: disk.queued_bytes < 10_000, "the queue to shorten")
        await until(lambda: disk.queued_bytes == 0, "the queue to be empty")
        assert known == set(tiers)
        assert len(known) < 1100


async def test_a_write_that_fails_is_told(tmp_path: Path) -> None:
    async with running(tmp_path) as disk:
        told: dict[ChunkKey, bool] = {}
        disk.watchers.append(lambda name, is_here: told.update({name: is_here}))
        too_large = StoredFrame(name_of(1), bytes(1 << 19), LAYOUT, 1 << 20)
        disk.put(too_large)
        assert disk.find(name_of(1)) is too_large
        await until(lambda: told == {name_of(1): False}, "the refusal")
        assert disk.drops == {"large": 1, "queue": 0}


@pytest.mark.parametrize("loss", ["", "small"])
async def test_a_chunk_is_not_written_twice(tmp_path: Path, loss: str) -> None:
    async with running(tmp_path) as tier:
        tier.put(stored(1, loss="small"))
        await until(lambda: tier.frames_written == 1, "the write")
        await until(lambda: tier.queued_bytes == 0, "the queue to be empty")
        tier.put(stored(1, loss=loss))
        assert bool(tier.queued_bytes) is (loss == "")


async def test_a_lossy_chunk_on_disk_is_not_the_exact_one(tmp_path: Path) -> None:
    async with running(tmp_path) as tier:
        tier.put(stored(1, loss="small"))
        assert not tier.has_written(name_of(1), None)
        await until(lambda: tier.has_written(name_of(1), None), "the write")
        assert tier.has_written(name_of(1), "small")
        assert not tier.has_written(name_of(1), "")
