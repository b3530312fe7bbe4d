"""One segment: a file of frames, one after the other, and beside it the index of what they are.

Appending writes the frames first and their entries second. So whenever the process ends, what the
index names is whole, and what it does not name is cut off when the segment is opened again. Written
by one thread, that of the store; read by any.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from mcp_vllm.codec import ChunkLayout
from mcp_vllm.errors import McpError
from mcp_vllm.store.disk import entry as entries
from mcp_vllm.store.disk.entry import DEAD, HEAD, MAGIC, STATE_OFFSET, VERSION, Entry, StoredFrame
from mcp_vllm.store.ram import ChunkKey

FRAMES_SUFFIX = ".frames"
INDEX_SUFFIX = ".index"
SUFFIXES = (FRAMES_SUFFIX, INDEX_SUFFIX)
# Buffers in one writev.
MAX_BUFFERS = 512
MAX_INDEX_BYTES = 1 << 30


class DiskError(McpError):
    """The folder, or a file in it, cannot be used."""


class DamagedSegment(DiskError):
    """A segment that was not finished, or of which nothing can be read any more."""


class Record(NamedTuple):
    """Where a stored frame lies, and what it is; holding one keeps its bytes readable."""

    name: ChunkKey
    layout: ChunkLayout
    raw_bytes: int
    loss: str
    seal_id: str
    segment: Segment
    offset: int
    frame_bytes: int
    checksum: bytes
    tick: int
    entry_at: int
    entry_bytes: int

    @property
    def held_bytes(self) -> int:
        """What it takes on the disk: its frame and its entry."""
        return self.frame_bytes + self.entry_bytes

    def is_whole(self, frame: bytes) -> bool:
        """Whether these are the bytes that were stored."""
        return len(frame) == self.frame_bytes and xxhash.xxh3_128_digest(frame) == self.checksum

    def stored(self, frame: bytes) -> StoredFrame:
        return StoredFrame(self.name, frame, self.layout, self.raw_bytes, self.loss, self.seal_id)


class Segment:
    """An open segment. Its files are closed when nothing refers to it any more.

    Attributes:
        live: its live records, and `live_bytes` what they take, entries included; the store's.
    """

    def __init__(self, folder: Path, number: int) -> None:
        """Raises OSError."""
        self.number = number
        self.live: dict[ChunkKey, Record] = {}
        self.live_bytes = 0
        self._frames_path = folder / f"{number:08d}{FRAMES_SUFFIX}"
        self._index_path = folder / f"{number:08d}{INDEX_SUFFIX}"
        self._frames_fd = _opened(self, self._frames_path)
        self._index_fd = _opened(self, self._index_path)
        self._frames_end = os.fstat(self._frames_fd).st_size
        self._index_end = os.fstat(self._index_fd).st_size

    @property
    def file_bytes(self) -> int:
        """Of both files."""
        return self._frames_end + self._index_end

    @classmethod
    def create(cls, folder: Path, number: int) -> Segment:
        """An empty segment. Raises OSError: nothing of it remains."""
        segment = cls(folder, number)
        try:
            _write(segment._index_fd, [HEAD.pack(MAGIC, VERSION, number)], 0)
        except OSError:
            segment.unlink()
            raise
        segment._index_end = HEAD.size
        return segment

    def recover(self) -> list[tuple[Record, bool]]:
        """After opening: what is in it, and whether that is live. What is not whole is cut off.

        Raises:
            DamagedSegment: nothing in it can be used.
            DiskError: it is of another version.
            OSError: it cannot be read.
        """
        if self._index_end > MAX_INDEX_BYTES:
            raise DamagedSegment(f"{self._index_path} is too large for an index")
        index = os.pread(self._index_fd, self._index_end, 0)
        self._check_head(index)
        found = [each for each in entries.read_entries(index) if self._fits(each)]
        self._frames_end = max((each.offset + each.frame_bytes for each in found), default=0)
        self._index_end = max((each.at + each.entry_bytes for each in found), default=HEAD.size)
        self._cut()
        return [(self._record(each), each.is_live) for each in found]

    def _check_head(self, index: bytes) -> None:
        if len(index) < HEAD.size:
            raise DamagedSegment(f"{self._index_path} has no head")
        magic, version, number = HEAD.unpack_from(index)
        if magic != MAGIC or number != self.number:
            raise DamagedSegment(f"{self._index_path} is no index of segment {self.number}")
        if version != VERSION:
            raise DiskError(f"{self._index_path} is of version {version}, not {VERSION}")

    def _fits(self, each: Entry) -> bool:
        return each.frame_bytes > 0 and each.offset + each.frame_bytes <= self._frames_end

    def _record(self, each: Entry) -> Record:
        return Record(
            each.name, each.layout, each.raw_bytes, each.loss, each.seal_id, self,
            each.offset, each.frame_bytes, each.checksum, each.tick, each.at, each.entry_bytes,
        )  # fmt: skip

    def append(self, batch: Sequence[StoredFrame], ticks: Sequence[int]) -> list[Record]:
        """Write the frames one after the other, then their entries.

        Raises:
            OSError: none of them was stored (a full disk).
        """
        records: list[Record] = []
        packed: list[bytes] = []
        offset, at = self._frames_end, self._index_end
        for each, tick in zip(batch, ticks, strict=True):
            checksum, size = xxhash.xxh3_128_digest(each.frame), len(each.frame)
            body = entries.pack_entry(each, offset, checksum, tick)
            records.append(
                Record(
                    each.name, each.layout, each.raw_bytes, each.loss, each.seal_id, self,
                    offset, size, checksum, tick, at, len(body),
                )
            )  # fmt: skip
            packed.append(body)
            offset, at = offset + size, at + len(body)
        try:
            _write(self._frames_fd, [each.frame for each in batch], self._frames_end)
            _write(self._index_fd, packed, self._index_end)
        except OSError:
            with contextlib.suppress(OSError):
                self._cut()
            raise
        self._frames_end, self._index_end = offset, at
        return records

    def mark_dead(self, record: Record) -> None:
        """The record is not found again after a restart. Needs no space. Raises OSError."""
        os.pwrite(self._index_fd, bytes([DEAD]), record.entry_at + STATE_OFFSET)

    def expect(self, start: int, end: int) -> None:
        """These bytes are going to be read. Raises OSError."""
        os.posix_fadvise(self._frames_fd, start, end - start, os.POSIX_FADV_WILLNEED)

    def read(self, offset: int, size: int) -> bytes:
        """From any thread; fewer bytes where the file ends. Raises OSError."""
        return os.pread(self._frames_fd, size, offset)

    def unlink(self) -> None:
        """Remove its files; records that somebody still reads stay readable. Index first: frames
        without an index are removed at the next start. Raises OSError."""
        self._index_path.unlink(missing_ok=True)
        self._frames_path.unlink(missing_ok=True)

    def sync(self) -> None:
        """Wait until all of it is on the disk. Raises OSError."""
        os.fdatasync(self._frames_fd)
        os.fdatasync(self._index_fd)

    def _cut(self) -> None:
        os.ftruncate(self._index_fd, self._index_end)
        os.ftruncate(self._frames_fd, self._frames_end)


def numbers_in(folder: Path) -> Iterator[int]:
    """The numbers of the segments there, those included of which only one file is left."""
    found = set()
    for path in folder.iterdir():
        stem, suffix = path.stem, path.suffix
        if suffix in SUFFIXES and len(stem) == 8 and stem.isdecimal():
            found.add(int(stem))
    return iter(sorted(found))


def is_pair(folder: Path, number: int) -> bool:
    """Whether both files of the segment are there."""
    return all((folder / f"{number:08d}{suffix}").is_file() for suffix in SUFFIXES)


def _opened(owner: Segment, path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    weakref.finalize(owner, os.close, fd)
    return fd


def _write(fd: int, buffers: Sequence[bytes], offset: int) -> None:
    """All of it, in as few system calls as the system allows. Raises OSError."""
    for start in range(0, len(buffers), MAX_BUFFERS):
        part: list[bytes | memoryview] = list(buffers[start : start + MAX_BUFFERS])
        while part:
            written = os.pwritev(fd, part, offset)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            offset += written
            while part and written >= len(part[0]):
                written -= len(part.pop(0))
            if written:
                part[0] = memoryview(part[0])[written:]
