"""A folder of segments at start: locked for one process, and read. What no index names is gone."""

from __future__ import annotations

import fcntl
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from mcp_vllm.codec.loss import rank
from mcp_vllm.store.disk.segment import (
    SUFFIXES,
    DamagedSegment,
    DiskError,
    Record,
    Segment,
    is_pair,
    numbers_in,
)
from mcp_vllm.store.ram import ChunkKey

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"


@dataclass
class Found:
    """What was in a folder.

    Attributes:
        records: the live ones, each name once: of two copies that which has lost less.
        other_bytes: of segments that are not ours to read, and stay.
    """

    segments: dict[int, Segment] = field(default_factory=dict)
    records: dict[ChunkKey, Record] = field(default_factory=dict)
    other_bytes: int = 0
    next_number: int = 1
    next_tick: int = 1


def locked(folder: Path) -> int:
    """A descriptor that holds the folder's lock. Raises DiskError: another process has it."""
    fd = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise DiskError(f"another process uses {folder}: give each agent a folder") from None
    return fd


def read_folder(folder: Path) -> Found:
    """All segments there, opened. Raises OSError."""
    found = Found()
    for number in numbers_in(folder):
        found.next_number = number + 1
        for record in _opened(folder, number, found):
            present = found.records.get(record.name)
            if present is None or rank(record.loss) < rank(present.loss):
                found.records[record.name], record = record, present or record
            if found.records[record.name] is not record:
                record.segment.mark_dead(record)
    for record in found.records.values():
        record.segment.live[record.name] = record
        record.segment.live_bytes += record.held_bytes
    return found


def _opened(folder: Path, number: int, found: Found) -> list[Record]:
    """The live records of that segment; none where it is of no use."""
    segment = Segment(folder, number) if is_pair(folder, number) else None
    try:
        if segment is None:
            raise DamagedSegment(f"segment {number} lacks one of its files")
        records = segment.recover()
    except DamagedSegment as error:
        logger.warning("a segment in %s is removed: %s", folder, error)
        for suffix in SUFFIXES:
            (folder / f"{number:08d}{suffix}").unlink(missing_ok=True)
        return []
    except DiskError as error:
        logger.error("%s: left alone; remove it, or use another folder", error)
        assert segment is not None
        found.other_bytes += segment.file_bytes
        return []
    found.segments[number] = segment
    found.next_tick = max([found.next_tick, *(each.tick + 1 for each, _ in records)])
    return [record for record, is_live in records if is_live]
