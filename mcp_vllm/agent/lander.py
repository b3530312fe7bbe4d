"""Fills an engine's landing slots with chunks as they arrive, several at a time.

Handing work to the pool and telling the engine cost as much as decoding a small chunk does, so what
has arrived meanwhile goes together: nothing waits for company, and the busier, the fewer messages.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.landing import LandingSlots
from mcp_vllm.codec import CodecError

# In one message, and not much more than so many bytes, raw: that is a few milliseconds of decoding.
# A load holds twice as many frames, so that the next come in meanwhile.
CHUNKS_AT_ONCE = 4
BYTES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Arrival:
    """A chunk that has come.

    Attributes:
        index: of the chunk in its load.
        size: in bytes, raw.
        fill: writes it, in a thread of the pool; raises CodecError.
        landed: called when the engine has been told.
        damaged: called with what `fill` raised.
    """

    index: int
    size: int
    fill: Callable[[memoryview], None]
    landed: Callable[[], None]
    damaged: Callable[[CodecError], None]


class Lander:
    """Of one load. Its tasks run in `tasks`, which ends when all that was put has landed.

    Args:
        announce: tells the engine of chunks and their slots.
    """

    def __init__(
        self,
        context: AgentContext,
        slots: LandingSlots,
        tasks: asyncio.TaskGroup,
        announce: Callable[[Sequence[tuple[int, int]]], Awaitable[None]],
    ) -> None:
        self._context = context
        self._slots = slots
        self._tasks = tasks
        self._announce = announce
        self._room = asyncio.Semaphore(2 * CHUNKS_AT_ONCE * context.codec_threads)
        self._waiting: deque[Arrival] = deque()
        self._num_workers = 0

    async def room(self) -> None:
        """Wait until one more chunk may come; each `put` takes one."""
        await self._room.acquire()

    def put(self, arrival: Arrival) -> None:
        """Land it. There must be room for it."""
        self._waiting.append(arrival)
        if self._num_workers < self._context.codec_threads:
            self._num_workers += 1
            self._tasks.create_task(self._work())

    def give_back(self) -> None:
        """The chunk for which there was room has not come."""
        self._room.release()

    async def _work(self) -> None:
        try:
            while self._waiting:
                slots = await self._slots.acquire(self._num_next())
                arrivals = [self._waiting.popleft() for _ in slots[: len(self._waiting)]]
                self._slots.release(slots[len(arrivals) :])
                if arrivals:  # another worker may have been quicker
                    await self._land(arrivals, slots[: len(arrivals)])
        finally:
            self._num_workers -= 1

    def _num_next(self) -> int:
        """How many chunks one worker takes of those that wait: its share, and not too many."""
        share = -(-len(self._waiting) // self._context.codec_threads)
        total, count = 0, 0
        while count < min(CHUNKS_AT_ONCE, share) and total < BYTES_AT_ONCE:
            total += self._waiting[count].size
            count += 1
        return count

    async def _land(self, arrivals: Sequence[Arrival], slots: list[int]) -> None:
        buffers = [
            self._slots.buffer(slot, arrival.size)
            for slot, arrival in zip(slots, arrivals, strict=True)
        ]
        work = asyncio.ensure_future(self._context.in_pool(_fill, arrivals, buffers))
        try:
            results = await asyncio.shield(work)
        except asyncio.CancelledError:
            # A pool thread may still be writing into the slots: they are free when that has ended.
            work.add_done_callback(lambda done: self._release_after(done, slots))
            raise
        except Exception:
            self._slots.release(slots)
            raise
        done = list(zip(arrivals, slots, results, strict=True))
        self._slots.release([slot for _, slot, error in done if error is not None])
        whole = [(arrival.index, slot) for arrival, slot, error in done if error is None]
        try:
            if whole:
                await self._announce(whole)
        finally:  # it may have been told, however this ends
            for arrival, _, error in done:
                self._room.release()
                if error is None:
                    arrival.landed()
                else:
                    arrival.damaged(error)

    def _release_after(
        self, done: asyncio.Future[list[CodecError | None]], slots: list[int]
    ) -> None:
        if not done.cancelled():
            done.exception()
        self._slots.release(slots)


def _fill(arrivals: Sequence[Arrival], buffers: Sequence[memoryview]) -> list[CodecError | None]:
    """Runs in the pool; of each arrival, what was wrong with it."""
    errors: list[CodecError | None] = []
    for arrival, buffer in zip(arrivals, buffers, strict=True):
        try:
            arrival.fill(buffer)
            errors.append(None)
        except CodecError as error:
            errors.append(error)
    return errors
