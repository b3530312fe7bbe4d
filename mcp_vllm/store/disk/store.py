"""Frames on disk under a byte budget: which are where, what leaves, and how space comes back.

Everything that changes something is called by one thread, that of the tier (`tier.py`). `find`,
`read` and `size` may be called by any: they take a snapshot of an entry in a dictionary, and a
`Record` keeps what it names readable. What the policy lets go is marked dead in place; segments
that are mostly dead are rewritten, and one segment's space is kept free for that.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mcp_vllm.codec.loss import rank
from mcp_vllm.store.chunk_policy import ChunkPolicy
from mcp_vllm.store.disk.batches import BATCH_BYTES, groups, parts, runs
from mcp_vllm.store.disk.entry import HEAD, StoredFrame, can_be_named
from mcp_vllm.store.disk.folder import locked, read_folder
from mcp_vllm.store.disk.segment import DiskError, Record, Segment
from mcp_vllm.store.ram import ChunkKey

logger = logging.getLogger(__name__)

MAX_SEGMENT_BYTES = 64 << 20
# Segments that a budget is made of at least: one is kept free for rewriting.
MIN_SEGMENTS = 32
# The rest of the budget is for what is dead: more of that means less rewriting.
LIVE_SHARE = 0.9
# A segment of which less is live is rewritten before space is short.
SPARSE_SHARE = 0.5
# After a write that failed, until the next is tried.
RETRY_S = 1.0


@dataclass(frozen=True)
class DiskSize:
    """What a store holds, in bytes and chunks; `file_bytes` is all that its files take."""

    num_chunks: int
    live_bytes: int
    file_bytes: int
    budget_bytes: int
    num_segments: int
    is_full: bool


class Use(NamedTuple):
    """A request used this chain, root first; see `Tiers.touch`."""

    chain: Sequence[ChunkKey]
    num_output_tokens: int | None = None
    since_s: float | None = None


class DiskStore:
    """See the module's docstring.

    Args:
        policy: makes the policy for a number of bytes, once the folder is ours.
        segment_bytes: size at which another segment is begun; 0: by the budget.

    Attributes:
        watchers: each called with a name and whether it has come (or gone), by the owning thread.
        compactions: segments rewritten since the start.
        refused: why frames were not stored since the start: cause -> number.
        damaged: frames that were not what had been stored.
    """

    def __init__(
        self,
        folder: Path,
        budget_bytes: int,
        *,
        policy: Callable[[int], ChunkPolicy] = ChunkPolicy,
        segment_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Lock the folder, and find what is in it.

        Raises:
            DiskError: another process uses it, or it cannot be read or written.
        """
        self._folder, self._budget_bytes, self._clock = folder, budget_bytes, clock
        self._segment_bytes = segment_bytes or min(MAX_SEGMENT_BYTES, budget_bytes // MIN_SEGMENTS)
        # Room to rewrite a segment, and the heads of what it is rewritten into.
        self._reserve_bytes = self._segment_bytes + 4 * HEAD.size
        live_bytes = int(LIVE_SHARE * (budget_bytes - self._segment_bytes - self._reserve_bytes))
        if live_bytes <= 0:
            raise DiskError(f"{budget_bytes} bytes are too few for a disk store")
        self._records: dict[ChunkKey, Record] = {}
        self._segments: dict[int, Segment] = {}
        self._active: Segment | None = None
        self._other_bytes = 0
        self._next_number, self._next_tick = 1, 1
        self._full_until_s: float | None = None
        self.watchers: list[Callable[[ChunkKey, bool], None]] = []
        self.compactions = 0
        self.damaged = 0
        self.refused: dict[str, int] = {}
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = locked(folder)
            self.policy = policy(live_bytes)
            self._recover()
        except OSError as error:
            raise DiskError(f"{folder} cannot be used for chunks: {error}") from error

    # ---- any thread -------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[ChunkKey]:
        return iter(list(self._records))

    def find(self, name: ChunkKey) -> Record | None:
        """Where the chunk is; None when it is not here. Does not count as a use: see `touch`."""
        return self._records.get(name)

    def size(self) -> DiskSize:
        return DiskSize(
            len(self._records),
            self.policy.held_bytes,
            self._file_bytes(),
            self._budget_bytes,
            len(self._segments),
            self._full_until_s is not None,
        )

    def read(self, records: Iterable[Record]) -> dict[ChunkKey, bytes | None]:
        """The frames, in the order of their places; None for those that are damaged."""
        wanted = sorted(records, key=lambda each: (each.segment.number, each.offset))
        frames: dict[ChunkKey, bytes | None] = {}
        for run in runs(wanted):
            try:
                # The disk is told of all of it at once; each frame is then copied once only.
                run[0].segment.expect(run[0].offset, run[-1].offset + run[-1].frame_bytes)
                for each in run:
                    frame = each.segment.read(each.offset, each.frame_bytes)
                    frames[each.name] = frame if each.is_whole(frame) else None
            except OSError as error:
                logger.error("frames in %s cannot be read: %s", self._folder, error)
                frames.update((each.name, None) for each in run if each.name not in frames)
        return frames

    # ---- the owning thread ------------------------------------------------------------------

    def write(self, batch: Sequence[StoredFrame]) -> int:
        """Store what the policy takes, one after the other; returns how many were written.

        A chunk that is here stays, unless the new one has lost less.
        """
        chosen: dict[ChunkKey, StoredFrame] = {}
        for stored in batch:
            if self._is_wanted(stored):
                self._admit(stored, chosen)
        written = 0
        for part in parts(list(chosen.values()), self._segment_bytes - HEAD.size):
            records = self._append(part, [self._tick() for _ in part])
            for record in records:
                self._add(record)
            for stored in part[len(records) :]:
                self._keep_present(stored)
                self._refuse("full")
            written += len(records)
        self._tidy()
        return written

    def touch(self, use: Use) -> None:
        """A request used a chain."""
        self.policy.access(use.chain, num_output_tokens=use.num_output_tokens, since_s=use.since_s)

    def discard(self, name: ChunkKey) -> None:
        """Forget the chunk, if present, for good."""
        record = self._records.get(name)
        if record is not None:
            self.policy.remove(name)
            self._bury(record)

    def discard_damaged(self, record: Record) -> None:
        """The record did not read as what was stored; no effect if it has been replaced."""
        if self._records.get(record.name) is record:
            self.damaged += 1
            logger.warning("chunk %s on disk is damaged: dropped", record.name.key.hex())
            self.discard(record.name)

    def compact(self) -> None:
        """Rewrite every segment in which something is dead, as far as there is room for it."""
        for segment in list(self._segments.values()):
            if segment.number in self._segments and _dead_bytes(segment):
                self._rewrite(segment)

    def close(self) -> None:
        """What was stored is on the disk when this returns; another process may use the folder."""
        with suppress(OSError):
            if self._active is not None:
                self._active.sync()
        self.policy.keep()
        self._active = None
        for segment in self._segments.values():
            segment.live.clear()  # it refers back: files are closed when the last reader is done
        self._segments.clear()
        self._records = {}
        os.close(self._lock_fd)

    def check_integrity(self) -> None:
        """Recount everything, and compare with the files; for tests.

        Raises:
            AssertionError: the accounts and the contents differ.
        """
        found: dict[ChunkKey, Record] = {}
        for segment in self._segments.values():
            assert segment.live_bytes == sum(each.held_bytes for each in segment.live.values())
            assert not segment.live.keys() & found.keys()
            found.update(segment.live)
        assert found == self._records
        assert all(name in self.policy for name in found)
        assert self.policy.held_bytes == sum(each.held_bytes for each in found.values())
        sizes = [path.stat().st_size for path in self._folder.iterdir() if path.stem.isdecimal()]
        assert sum(sizes) == self._file_bytes() <= self._budget_bytes

    def _is_wanted(self, stored: StoredFrame) -> bool:
        present = self._records.get(stored.name)
        if present is not None and rank(present.loss) <= rank(stored.loss):
            return False
        if not can_be_named(stored) or stored.held_bytes > self._segment_bytes - HEAD.size:
            self._refuse("large")
            return False
        if not self._may_write():
            self._refuse("full")
            return False
        return True

    def _admit(self, stored: StoredFrame, chosen: dict[ChunkKey, StoredFrame]) -> None:
        """Ask the policy for `stored`; what has to leave for it leaves."""
        name = stored.name
        if name in chosen and rank(chosen[name].loss) <= rank(stored.loss):
            return
        present = self._records.get(name)
        worse = chosen.pop(name, None)
        self.policy.remove(name)
        admission = self.policy.admit(name, stored.held_bytes)
        for victim in admission.evicted:
            chosen.pop(victim, None)
            if victim in self._records:
                self._bury(self._records[victim])
        if name in admission.kept:
            chosen[name] = stored
            return
        self._refuse("policy")
        # What has lost more than the refused one is still better than nothing.
        if worse is not None:
            chosen[name] = worse
        if (kept := worse or present) is not None:
            self.policy.hold(name, kept.held_bytes)

    def _keep_present(self, stored: StoredFrame) -> None:
        """It could not be written: the one that it was to replace, if any, stays."""
        self.policy.remove(stored.name)
        present = self._records.get(stored.name)
        if present is None:
            return
        if self.policy.has_room(present.held_bytes):
            self.policy.hold(stored.name, present.held_bytes)
        else:
            self._bury(present)  # its room is promised to others, which may have been written

    def _append(self, batch: Sequence[StoredFrame], ticks: Sequence[int]) -> list[Record]:
        """Write them into the active segment, or one begun for them; none where that fails."""
        need = sum(stored.held_bytes for stored in batch)
        if not self._make_room(need + HEAD.size):
            return []
        try:
            records = self._segment_for(need).append(batch, ticks)
        except OSError as error:
            self._note_full(error)
            return []
        if self._full_until_s is not None:
            self._full_until_s = None
            logger.warning("%s takes chunks again", self._folder)
        return records

    def _segment_for(self, need: int) -> Segment:
        active = self._active
        if active is None or active.file_bytes + need > self._segment_bytes:
            self._active = None
            if active is not None and not active.live:
                self._unlink(active)
            active = Segment.create(self._folder, self._next_number)
            self._next_number += 1
            self._segments[active.number] = self._active = active
        return active

    def _make_room(self, need: int) -> bool:
        while self._file_bytes() + need > self._budget_bytes - self._reserve_bytes:
            victim = max(self._segments.values(), key=_dead_bytes, default=None)
            if victim is None or not _dead_bytes(victim) or not self._rewrite(victim):
                return False
        return True

    def _tidy(self) -> None:
        """Rewrite the sparsest segment, if it is sparse."""
        closed = [each for each in self._segments.values() if each is not self._active]
        sparsest = min(closed, key=lambda each: each.live_bytes / each.file_bytes, default=None)
        if sparsest is not None and sparsest.live_bytes < SPARSE_SHARE * sparsest.file_bytes:
            self._rewrite(sparsest)

    def _rewrite(self, victim: Segment) -> bool:
        """Append what is live in it elsewhere, and remove it; False where the disk is full."""
        if not self._may_write():
            return False
        if self._file_bytes() + victim.live_bytes + 4 * HEAD.size > self._budget_bytes:
            self._give_up(victim)  # a segment of a time with a larger budget
            return True
        if victim is self._active:
            self._active = None
        for part in groups(list(victim.live.values()), BATCH_BYTES):
            frames = self.read(part)
            whole = [(each, frame) for each in part if (frame := frames[each.name]) is not None]
            for each in part:
                if frames[each.name] is None:
                    self.discard_damaged(each)
            if victim.number not in self._segments:
                return True
            if not whole or self._move(whole):
                continue
            return False
        if victim.number in self._segments:
            self._unlink(victim)
        self.compactions += 1
        return True

    def _move(self, whole: Sequence[tuple[Record, bytes]]) -> bool:
        moving = [each.stored(frame) for each, frame in whole]
        for part in parts(moving, self._segment_bytes - HEAD.size):
            old = [self._records[stored.name] for stored in part]
            try:
                segment = self._segment_for(sum(stored.held_bytes for stored in part))
                moved = segment.append(part, [each.tick for each in old])
            except OSError as error:
                self._note_full(error)
                return False
            for before, after in zip(old, moved, strict=True):
                self._unlink_record(before)
                self._index(after)
        return True

    def _add(self, record: Record) -> None:
        """Written for good: one that it replaces is dead only now."""
        present = self._records.get(record.name)
        if present is not None:
            self._bury(present)
        elif record.name not in self.policy:  # its predecessor was damaged, and found while writing
            self.policy.hold(record.name, record.held_bytes)
        self._index(record)
        self._tell(record.name, True)

    def _index(self, record: Record) -> None:
        self._records[record.name] = record
        record.segment.live[record.name] = record
        record.segment.live_bytes += record.held_bytes

    def _bury(self, record: Record) -> None:
        """It is here no more, and will not be after a restart; the policy knows."""
        del self._records[record.name]
        self._unlink_record(record)
        segment = record.segment
        if not segment.live and segment is not self._active:
            self._unlink(segment)
        self._tell(record.name, False)

    def _unlink_record(self, record: Record) -> None:
        segment = record.segment
        del segment.live[record.name]
        segment.live_bytes -= record.held_bytes
        try:
            segment.mark_dead(record)
        except OSError as error:
            logger.error("%s: a chunk may come back after a restart: %s", self._folder, error)

    def _unlink(self, segment: Segment) -> None:
        del self._segments[segment.number]
        try:
            segment.unlink()
        except OSError as error:
            self._other_bytes += segment.file_bytes
            logger.error("segment %d in %s stays: %s", segment.number, self._folder, error)

    def _may_write(self) -> bool:
        return self._full_until_s is None or self._clock() >= self._full_until_s

    def _note_full(self, error: OSError) -> None:
        if self._full_until_s is None:
            logger.warning(
                "%s takes no more chunks (%s): those that it has are served; make room there, or "
                "lower agent.disk.bytes",
                self._folder,
                error.strerror,
            )
        self._full_until_s = self._clock() + RETRY_S

    def _refuse(self, cause: str) -> None:
        self.refused[cause] = self.refused.get(cause, 0) + 1

    def _tell(self, name: ChunkKey, present: bool) -> None:
        for watcher in self.watchers:
            watcher(name, present)

    def _tick(self) -> int:
        self._next_tick += 1
        return self._next_tick - 1

    def _file_bytes(self) -> int:
        return self._other_bytes + sum(each.file_bytes for each in list(self._segments.values()))

    # ---- starting ---------------------------------------------------------------------------

    def _recover(self) -> None:
        found = read_folder(self._folder)
        self._segments, self._records = found.segments, found.records
        self._other_bytes = found.other_bytes
        self._next_number, self._next_tick = found.next_number, found.next_tick
        self._take_over(sorted(found.records.values(), key=lambda each: each.tick))
        for segment in list(self._segments.values()):
            if not segment.live:
                self._unlink(segment)
        last = self._segments.get(self._next_number - 1)
        if last is not None and last.file_bytes < self._segment_bytes:
            self._active = last
        while not self._make_room(0) and self._segments:
            self._give_up(min(self._segments.values(), key=lambda each: each.live_bytes))

    def _take_over(self, records: Sequence[Record]) -> None:
        """Into the policy, the oldest first; with a smaller budget than before, not all."""
        for record in records:
            admission = self.policy.admit(record.name, record.held_bytes)
            for victim in admission.evicted:
                self._bury(self._records[victim])
            if record.name not in admission.kept:
                self._bury(record)

    def _give_up(self, segment: Segment) -> None:
        """Remove a segment with all that is in it: a rewrite would need room that is not there."""
        if segment is self._active:
            self._active = None
        for record in list(segment.live.values()):
            self.discard(record.name)
        if segment.number in self._segments:
            self._unlink(segment)


def _dead_bytes(segment: Segment) -> int:
    return max(0, segment.file_bytes - segment.live_bytes - HEAD.size)
