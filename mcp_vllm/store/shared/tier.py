"""The shared store for an event loop: frames in a Redis or Valkey server that many agents use.

Nobody is told what is there: a lookup asks, and what it found is known for a while (`find`). Writes
wait in a bounded queue. A server that fails, or does not answer in time, is down at once: from then
on nothing asks it until a task of its own, with back-off, finds that it answers. So a dead or slow
server costs a request one deadline at most, and only those that were asking at that moment.

How long frames stay is the server's matter: each has a time to live, renewed by its uses, and the
server evicts by its own policy. What is read is untrusted: bounded, and checked as `value` says.
Owned by the event loop that calls `start`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mcp_vllm.store.disk import StoredFrame
from mcp_vllm.store.disk.entry import Entry, can_be_named
from mcp_vllm.store.ram import Chunk, ChunkKey
from mcp_vllm.store.shared.client import redis_faults
from mcp_vllm.store.shared.value import (
    DamagedValue,
    head_bytes,
    pack_value,
    read_head,
    read_value,
    server_key,
)

if TYPE_CHECKING:
    from redis.asyncio import Redis

logger = logging.getLogger(__name__)

# What a lookup found is believed for so long, and so many of them.
KNOWN_S = 30.0
MAX_KNOWN = 16_384
# Chunks of one lookup that are asked for, the front of the chain; the rest are misses: commands and
# answers take the event loop some microseconds each.
MAX_LOOKUP = 1024
BATCH_BYTES = 4 << 20
READS_AT_ONCE = 4
# A server that moves less than this is down.
LEAST_BYTES_S = 10e6
RETRY_MIN_S, RETRY_MAX_S = 0.5, 15.0
CLOSE_S = 1.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class Limits:
    """Attributes:
    ttl_s: seconds that a frame stays after its last use; 0: until the server evicts it.
    max_frame_bytes: larger frames are neither written nor read.
    queue_bytes: of frames that wait to be written.
    answer_s: what a small question may take.
    """

    ttl_s: int
    max_frame_bytes: int
    queue_bytes: int
    answer_s: float


class SharedTier:
    """See the module's docstring.

    Args:
        may_lie_there: whether a chunk may be there sealed with the key of that id (empty: not
            sealed); what may not is neither written nor believed.

    Attributes:
        is_up: whether the server is asked.
        hits, misses: of lookups, in chunks; `reads`, `writes`: frames; `failures`: of the server.
        drops: frames that were not written, by cause.
        damaged: values that were not what they said they are.
    """

    def __init__(
        self, client: Redis, limits: Limits, may_lie_there: Callable[[ChunkKey, str], bool]
    ) -> None:
        self._client = client
        self._limits = limits
        self._may_lie_there = may_lie_there
        self._known: OrderedDict[ChunkKey, tuple[Entry, float]] = OrderedDict()
        self._queue: list[StoredFrame | ChunkKey] = []
        self._work = asyncio.Event()
        self._reading = asyncio.Semaphore(READS_AT_ONCE)
        self._writer: asyncio.Task[None] | None = None
        self._revival: asyncio.Task[None] | None = None
        self._faults = redis_faults()
        self.is_up = True
        self.queued_bytes = self.hits = self.misses = self.reads = self.writes = 0
        self.failures = self.damaged = 0
        self.drops: Counter[str] = Counter(queue=0, down=0, refused=0, large=0, unsealed=0)

    def start(self) -> None:
        """Begin to write; in the event loop that owns this."""
        self._writer = asyncio.create_task(self._write_for_ever())

    async def close(self) -> None:
        """What is queued is written if that takes no time."""
        if self._queue and self.is_up:
            await self._write(self._taken())
        tasks = [task for task in (self._writer, self._revival) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._client.aclose()
        except self._faults:
            logger.debug("the connections to the shared store were not closed in time")

    # ---- asking -----------------------------------------------------------------------------

    def find(self, name: ChunkKey) -> Entry | None:
        """The chunk as a lookup has found it lately; nobody is asked."""
        entry, found_s = self._known.get(name, (None, 0.0))
        return entry if entry is not None and time.monotonic() < found_s + KNOWN_S else None

    async def locate(self, names: Iterable[ChunkKey], deadline_s: float) -> None:
        """Ask which of these are there; `find` answers for them then."""
        asked = [name for name in names if self.find(name) is None][:MAX_LOOKUP]
        if not asked or not self.is_up or deadline_s <= 0:
            return
        # Where others used up the time, being late is not the server's fault.
        is_fair = deadline_s >= self._limits.answer_s / 4
        heads = await self._within(deadline_s, self._heads(asked), is_fair=is_fair)
        for name, head in zip(asked, heads or (), strict=False):
            entry = read_head(name, head) if isinstance(head, bytes) else None
            if entry is not None and self._is_acceptable(entry):
                self._know(entry)
                self.hits += 1
            else:
                self.misses += 1

    async def get(self, name: ChunkKey) -> Chunk | None:
        """The chunk with its frame, whole; None: it is gone, damaged, or the server is down."""
        known = self.find(name)
        if known is None:
            return None
        async with self._reading:
            limit_s = self._limits.answer_s + READS_AT_ONCE * known.frame_bytes / LEAST_BYTES_S
            value = await self._within(limit_s, self._value(name)) if self.is_up else None
        if not value:
            self._known.pop(name, None)
            return None
        try:
            entry, frame = read_value(name, value)
        except DamagedValue as error:
            logger.warning("chunk %s in the shared store is damaged: %s", name.key.hex(), error)
            self.damaged += 1
            self.discard(name)
            return None
        if not self._is_acceptable(entry):
            self._known.pop(name, None)
            return None
        self.reads += 1
        return Chunk(entry.layout, entry.raw_bytes, frame=frame, loss=entry.loss)

    # ---- writing ----------------------------------------------------------------------------

    def put(self, stored: StoredFrame) -> None:
        """Write it soon, unless it is there or may not be, or the queue is full."""
        cause = self._refusal(stored)
        if cause:
            self.drops[cause] += 1
            return
        self.queued_bytes += len(stored.frame)
        self._add(stored)

    def discard(self, name: ChunkKey) -> None:
        """Take the chunk away there, if it is."""
        self._known.pop(name, None)
        if self.is_up:
            self._add(name)

    def _refusal(self, stored: StoredFrame) -> str:
        if not self.is_up:
            return "down"
        if len(stored.frame) > self._limits.max_frame_bytes or not can_be_named(stored):
            return "large"
        if not self._may_lie_there(stored.name, stored.seal_id):
            return "unsealed"
        full = self.queued_bytes + len(stored.frame) > self._limits.queue_bytes
        return "queue" if full else ""

    def _add(self, step: StoredFrame | ChunkKey) -> None:
        self._queue.append(step)
        self._work.set()

    def _taken(self) -> list[StoredFrame | ChunkKey]:
        """What comes next: about as many bytes as are written at once."""
        taken, size = 0, 0
        for step in self._queue[:MAX_LOOKUP]:
            taken += 1
            size += len(step.frame) if isinstance(step, StoredFrame) else 0
            if size >= BATCH_BYTES:
                break
        steps, self._queue = self._queue[:taken], self._queue[taken:]
        self.queued_bytes -= size
        return steps

    async def _write_for_ever(self) -> None:
        while True:
            await self._work.wait()
            steps = self._taken()
            if not self._queue:
                self._work.clear()
            await self._write(steps)

    async def _write(self, steps: Sequence[StoredFrame | ChunkKey]) -> None:
        """In their order: a chunk may be written and taken away."""
        if not self.is_up:
            self.drops["down"] += sum(isinstance(step, StoredFrame) for step in steps)
            return
        size = sum(len(step.frame) for step in steps if isinstance(step, StoredFrame))
        limit_s = self._limits.answer_s + size / LEAST_BYTES_S
        frames = [step for step in steps if isinstance(step, StoredFrame)]
        present = await self._within(limit_s, self._renew([each.name for each in frames]))
        if present is None:
            self.drops["down"] += len(frames)
            return
        there = {each.name for each, is_there in zip(frames, present, strict=True) if is_there}
        todo = [s for s in steps if not isinstance(s, StoredFrame) or s.name not in there]
        if not todo:
            return
        results = await self._within(limit_s, self._store(todo))
        for step, result in zip(todo, results or [None] * len(todo), strict=True):
            if isinstance(step, StoredFrame):
                if result is True:
                    self.writes += 1
                else:
                    self.drops["down" if result is None else "refused"] += 1

    # ---- commands ---------------------------------------------------------------------------

    async def _heads(self, names: Sequence[ChunkKey]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as steps:
            for name in names:
                steps.getrange(server_key(name), 0, head_bytes(name) - 1)
            return list(await steps.execute(raise_on_error=False))

    async def _value(self, name: ChunkKey) -> bytes:
        key = server_key(name)
        end = head_bytes(name) + self._limits.max_frame_bytes - 1
        async with self._client.pipeline(transaction=False) as steps:
            steps.getrange(key, 0, end)
            if self._limits.ttl_s:
                steps.expire(key, self._limits.ttl_s)
            value, *_ = await steps.execute()
        return bytes(value)

    async def _renew(self, names: Sequence[ChunkKey]) -> list[Any]:
        """Which of them are there; their time begins anew."""
        async with self._client.pipeline(transaction=False) as steps:
            for name in names:
                if self._limits.ttl_s:
                    steps.expire(server_key(name), self._limits.ttl_s)
                else:
                    steps.exists(server_key(name))
            return list(await steps.execute()) if names else []

    async def _store(self, todo: Sequence[StoredFrame | ChunkKey]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as steps:
            for step in todo:
                if isinstance(step, StoredFrame):
                    value = b"".join(pack_value(step))
                    steps.set(server_key(step.name), value, ex=self._limits.ttl_s or None)
                else:
                    steps.unlink(server_key(step))
            return list(await steps.execute(raise_on_error=False))

    # ---- the server -------------------------------------------------------------------------

    async def _within(
        self, limit_s: float, command: Awaitable[_T], *, is_fair: bool = True
    ) -> _T | None:
        """The command's result; None where the server did not give one in time: it is down then,
        if the time was fair."""
        try:
            async with asyncio.timeout(limit_s):
                return await command
        except self._faults as error:
            if is_fair or not isinstance(error, TimeoutError):
                self._lost(error)
            return None

    def _lost(self, error: Exception) -> None:
        self.failures += 1
        if not self.is_up:
            return
        self.is_up = False
        logger.warning(
            "the shared store does not answer (%s): going on without it",
            str(error)[:200] or type(error).__name__,
        )
        self._revival = asyncio.get_running_loop().create_task(self._revive())

    async def _revive(self) -> None:
        pause_s = RETRY_MIN_S
        while not self.is_up:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_MAX_S)
            try:
                async with asyncio.timeout(self._limits.answer_s):
                    await self._client.ping()
            except self._faults:
                continue
            self.is_up = True
            logger.info("the shared store answers again")

    def _is_acceptable(self, entry: Entry) -> bool:
        small = entry.frame_bytes <= self._limits.max_frame_bytes
        return small and self._may_lie_there(entry.name, entry.seal_id)

    def _know(self, entry: Entry) -> None:
        self._known[entry.name] = (entry, time.monotonic())
        self._known.move_to_end(entry.name)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
