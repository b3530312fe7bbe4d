"""The disk store for an event loop: nothing here waits for a file.

Writes wait in a bounded queue for one thread, which owns the store; what does not fit into the
queue is dropped and counted. Reads that are asked for at the same time are done together, in
another thread. Owned by the event loop that calls `start`; watchers are called there.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mcp_vllm.codec.loss import rank
from mcp_vllm.store.disk.batches import BATCH_BYTES
from mcp_vllm.store.disk.entry import StoredFrame
from mcp_vllm.store.disk.segment import Record
from mcp_vllm.store.disk.store import DiskSize, DiskStore, Use
from mcp_vllm.store.ram import Chunk, ChunkKey
from mcp_vllm.store.smart_cache import Explanation

logger = logging.getLogger(__name__)

QUEUE_BYTES = 64 << 20
# Uses of chains that wait to be told to the policy; more are forgotten.
MAX_TOUCHES = 1000


@dataclass(frozen=True)
class _Discard:
    name: ChunkKey


@dataclass(frozen=True)
class _Damaged:
    record: Record


@dataclass(frozen=True)
class _Mark:
    """Reached when all steps before it are done."""

    reached: asyncio.Future[None]


_Step = StoredFrame | Use | _Discard | _Damaged | _Mark


class DiskTier:
    """See the module's docstring.

    Attributes:
        watchers: each called with a name that may have come or gone, and whether it is here.
        dropped: frames that were not stored because the queue was full.
        queued_bytes: of frames that wait to be written.
        frames_read: frames read, and `frames_written` written, since the start.
    """

    def __init__(self, store: DiskStore, queue_bytes: int = QUEUE_BYTES) -> None:
        self._store = store
        self._queue_bytes = queue_bytes
        self._steps: list[_Step] = []
        # The newest of each name that is queued or being written.
        self._waiting: dict[ChunkKey, StoredFrame] = {}
        self._doomed: dict[ChunkKey, int] = {}
        self._touches = self.queued_bytes = 0
        self._changes: list[tuple[ChunkKey, bool]] = []
        self._reads: dict[Record, asyncio.Future[bytes | None]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._work = asyncio.Event()
        self._write_pool = ThreadPoolExecutor(1, thread_name_prefix="mcp-disk-writer")
        self._read_pool = ThreadPoolExecutor(1, thread_name_prefix="mcp-disk-reader")
        self.watchers: list[Callable[[ChunkKey, bool], None]] = []
        self.dropped = self.frames_read = self.frames_written = 0
        store.watchers.append(lambda name, present: self._changes.append((name, present)))

    def start(self) -> None:
        """Begin to write; in the event loop that owns this."""
        self._writer = asyncio.create_task(self._write())

    async def close(self) -> None:
        """Write what is queued, and leave the folder to others."""
        loop = asyncio.get_running_loop()
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)
        while self._steps:
            await loop.run_in_executor(self._write_pool, self._apply, self._taken())
        await loop.run_in_executor(self._write_pool, self._store.close)
        self._write_pool.shutdown()
        self._read_pool.shutdown()

    def __iter__(self) -> Iterator[ChunkKey]:
        """The names of all that `find` finds."""
        yield from list(self._waiting)
        yield from (
            name for name in self._store if name not in self._doomed and name not in self._waiting
        )

    def find(self, name: ChunkKey) -> Record | StoredFrame | None:
        """The chunk as it is stored, or waits for that; None: it is not here. Not a use of it."""
        waiting = self._waiting.get(name)
        if waiting is not None or name in self._doomed:
            return waiting
        return self._store.find(name)

    def has_written(self, name: ChunkKey, loss: str | None) -> bool:
        """Whether the chunk is in the files, and does not only wait for that; with no more loss
        than ``loss``, unless that is None."""
        held = self.find(name)
        if held is None or name in self._waiting:
            return False
        return loss is None or rank(held.loss) <= rank(loss)

    async def flush(self) -> None:
        """Until all that was put so far is written, or refused."""
        mark = _Mark(asyncio.get_running_loop().create_future())
        self._add(mark)
        await mark.reached

    def size(self) -> DiskSize:
        return self._store.size()

    async def explain(self, names: Sequence[ChunkKey]) -> list[Explanation | None]:
        """What the policy thinks of each, after all that was asked for before."""

        def explained() -> list[Explanation | None]:
            return [self._store.policy.explain(name) for name in names]

        return await asyncio.get_running_loop().run_in_executor(self._write_pool, explained)

    @property
    def drops(self) -> dict[str, int]:
        """Frames that were not stored, by cause."""
        return {**self._store.refused, "queue": self.dropped}

    @property
    def compactions(self) -> int:
        return self._store.compactions

    @property
    def damaged(self) -> int:
        return self._store.damaged

    def put(self, stored: StoredFrame) -> None:
        """Store it soon, unless it is here or the queue is full."""
        present = self.find(stored.name)
        if present is not None and rank(present.loss) <= rank(stored.loss):
            return
        if self.queued_bytes + len(stored.frame) > self._queue_bytes:
            self.dropped += 1
            return
        self._waiting[stored.name] = stored
        self.queued_bytes += len(stored.frame)
        self._add(stored)

    def touch(self, use: Use) -> None:
        """A request used a chain."""
        if self._touches < MAX_TOUCHES:
            self._touches += 1
            self._add(use)

    def discard(self, name: ChunkKey) -> None:
        """Forget the chunk, if present: from now on, and for good."""
        if self._store.find(name) is not None or name in self._waiting:
            self._doomed[name] = self._doomed.get(name, 0) + 1
            self._waiting.pop(name, None)
            self._add(_Discard(name))
            self._tell(name)

    async def get(self, name: ChunkKey) -> Chunk | None:
        """The chunk with its frame, as it was stored; None: it is not here, or damaged."""
        record = self.find(name)
        if record is None:
            return None
        if isinstance(record, StoredFrame):
            return Chunk(record.layout, record.raw_bytes, frame=record.frame, loss=record.loss)
        future = self._reads.get(record)
        if future is None:
            future = self._reads[record] = asyncio.get_running_loop().create_future()
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._read())
        frame = await asyncio.shield(future)
        if frame is None:
            self._add(_Damaged(record))
            return None
        return Chunk(record.layout, record.raw_bytes, frame=frame, loss=record.loss)

    # ---- reading ----------------------------------------------------------------------------

    async def _read(self) -> None:
        while self._reads:
            batch, size = [], 0
            for record in self._reads:
                batch.append(record)
                size += record.frame_bytes
                if size >= BATCH_BYTES:
                    break
            loop = asyncio.get_running_loop()
            frames: dict[ChunkKey, bytes | None] = {}
            try:
                frames = await loop.run_in_executor(self._read_pool, self._store.read, batch)
            except Exception:
                logger.exception("reading chunks from disk failed")
            finally:
                for record in batch:
                    future = self._reads.pop(record)
                    if not future.done():
                        future.set_result(frames.get(record.name))
            self.frames_read += len(batch)

    # ---- writing ----------------------------------------------------------------------------

    def _add(self, step: _Step) -> None:
        self._steps.append(step)
        self._work.set()

    def _taken(self) -> list[_Step]:
        """The steps that come next: about as many bytes as are written at once."""
        taken, size = 0, 0
        for step in self._steps:
            taken += 1
            size += len(step.frame) if isinstance(step, StoredFrame) else 0
            if size >= BATCH_BYTES:
                break
        steps, self._steps = self._steps[:taken], self._steps[taken:]
        return steps

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            steps = self._taken()
            if not self._steps:
                self._work.clear()
            await asyncio.shield(loop.run_in_executor(self._write_pool, self._apply, steps))
            self._applied(steps)

    def _apply(self, steps: Sequence[_Step]) -> None:
        """Runs in the writer's thread. Never raises: a step that fails is not done."""
        for kind, group in itertools.groupby(steps, key=type):
            try:
                if kind is StoredFrame:
                    batch = [step for step in group if isinstance(step, StoredFrame)]
                    self.frames_written += self._store.write(batch)
                    continue
                for step in group:
                    self._apply_step(step)
            except Exception:
                logger.exception("a step of the disk store failed")

    def _apply_step(self, step: _Step) -> None:
        match step:
            case Use():
                self._store.touch(step)
            case _Discard(name):
                self._store.discard(name)
            case _Damaged(record):
                self._store.discard_damaged(record)

    def _applied(self, steps: Sequence[_Step]) -> None:
        for step in steps:
            match step:
                case StoredFrame():
                    self.queued_bytes -= len(step.frame)
                    if self._waiting.get(step.name) is step:
                        del self._waiting[step.name]
                case Use():
                    self._touches -= 1
                case _Mark(reached):
                    if not reached.done():
                        reached.set_result(None)
                case _Discard(name):
                    self._doomed[name] -= 1
                    if not self._doomed[name]:
                        del self._doomed[name]
        changes, self._changes = self._changes, []
        refused = {step.name for step in steps if isinstance(step, StoredFrame)}
        for name in dict.fromkeys([name for name, _ in changes] + list(refused)):
            self._tell(name)

    def _tell(self, name: ChunkKey) -> None:
        present = self.find(name) is not None
        for watcher in self.watchers:
            watcher(name, present)
