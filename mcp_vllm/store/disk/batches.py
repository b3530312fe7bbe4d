"""How frames are grouped for one read, one write, one step of rewriting. Used by the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mcp_vllm.store.disk.entry import StoredFrame
from mcp_vllm.store.disk.segment import Record

# Read or rewritten at once.
BATCH_BYTES = 8 << 20


def runs(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Neighbours in one segment, to be read together; `records` come in the order of places."""
    run: list[Record] = []
    for each in records:
        last = run[-1] if run else None
        follows = (
            last is not None
            and each.segment is last.segment
            and each.offset == last.offset + last.frame_bytes
            and each.offset + each.frame_bytes - run[0].offset <= BATCH_BYTES
        )
        if not follows and run:
            yield run
            run = []
        run.append(each)
    if run:
        yield run


def groups(records: Sequence[Record], size_bytes: int) -> Iterator[list[Record]]:
    """Groups of about that many bytes, in order."""
    group: list[Record] = []
    for each in records:
        group.append(each)
        if sum(record.frame_bytes for record in group) >= size_bytes:
            yield group
            group = []
    if group:
        yield group


def parts(batch: Sequence[StoredFrame], size_bytes: int) -> Iterator[list[StoredFrame]]:
    """The batch in parts that fit into that many bytes each."""
    part: list[StoredFrame] = []
    room = size_bytes
    for stored in batch:
        if part and stored.held_bytes > room:
            yield part
            part, room = [], size_bytes
        part.append(stored)
        room -= stored.held_bytes
    if part:
        yield part
