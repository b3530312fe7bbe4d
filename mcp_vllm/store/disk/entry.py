"""What a segment's index says of one frame: which chunk it is, where it lies, and its checksum.

An index file is 16 bytes of head and then entries, appended only; all integers little-endian::

    head   4 "MCPD", 1 version, 3 zero, 8 number of the segment

    entry  4 "MCPE"
           1 state: 1 live, 0 dead; the only byte that changes in place, outside the checksum
           1 rank of the loss, 1 element type, 1 length N of the namespace
           2 length K of the key, 2 length T of the tenant in UTF-8
           4 channels, 4 position
           8 raw size of the chunk, 8 offset of the frame, 8 size of the frame
           8 tick: the order of writing, in all segments together
           16 id of the sealing key, padded with zeros
           16 xxh3_128 of the frame
           N namespace, K key, T tenant
           8 xxh3_64 of all of this with state 0

Used by `segment.py`. What is damaged is skipped: the next entry is found by its magic.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from mcp_vllm.codec import ChunkLayout, CodecError
from mcp_vllm.codec.layout import ELEMENTS
from mcp_vllm.codec.loss import EXACT, LOSSES, rank
from mcp_vllm.store.ram import ChunkKey

VERSION = 1
HEAD = struct.Struct("<4sB3xQ")
MAGIC = b"MCPD"

_ENTRY = struct.Struct("<4sBBBBHHIIQQQQ16s16s")
_ENTRY_MAGIC = b"MCPE"
_CHECKSUM_BYTES = 8
STATE_OFFSET = 4
LIVE, DEAD = 1, 0
MAX_NAMESPACE_BYTES = 255
MAX_KEY_BYTES = 256
MAX_TENANT_BYTES = 1024
MAX_RAW_BYTES = 1 << 32
MAX_SEAL_ID_BYTES = 16


@dataclass(frozen=True)
class StoredFrame:
    """A frame to be stored.

    Attributes:
        raw_bytes: size of the chunk as an engine holds it.
        loss: what its content has been through, see `codec.loss`.
        seal_id: the key that the frame is sealed with; empty: none.
    """

    name: ChunkKey
    frame: bytes
    layout: ChunkLayout
    raw_bytes: int
    loss: str = EXACT
    seal_id: str = ""

    @property
    def held_bytes(self) -> int:
        """What it takes on the disk: its frame and its entry."""
        return len(self.frame) + entry_bytes(self.name)


class Entry(NamedTuple):
    """An entry of an index, as read; `at` is its offset in the index file."""

    name: ChunkKey
    layout: ChunkLayout
    raw_bytes: int
    loss: str
    seal_id: str
    offset: int
    frame_bytes: int
    checksum: bytes
    tick: int
    is_live: bool
    at: int
    entry_bytes: int


def entry_bytes(name: ChunkKey) -> int:
    """The size of the chunk's entry."""
    names = len(name.namespace) + len(name.key) + len(name.tenant.encode())
    return _ENTRY.size + names + _CHECKSUM_BYTES


def can_be_named(stored: StoredFrame) -> bool:
    """Whether an entry can say it; engines and peers keep to narrower bounds."""
    name = stored.name
    return (
        len(name.namespace) <= MAX_NAMESPACE_BYTES
        and len(name.key) <= MAX_KEY_BYTES
        and len(name.tenant.encode()) <= MAX_TENANT_BYTES
        and 0 < stored.raw_bytes <= MAX_RAW_BYTES
        and len(stored.seal_id.encode()) <= MAX_SEAL_ID_BYTES
        and stored.loss in LOSSES
    )


def pack_entry(stored: StoredFrame, offset: int, checksum: bytes, tick: int) -> bytes:
    """A live entry for a frame that lies at `offset` of its segment."""
    name, tenant = stored.name, stored.name.tenant.encode()
    fixed = _ENTRY.pack(
        _ENTRY_MAGIC,
        DEAD,
        rank(stored.loss),
        ELEMENTS.index(stored.layout.element),
        len(name.namespace),
        len(name.key),
        len(tenant),
        stored.layout.channels,
        stored.layout.position,
        stored.raw_bytes,
        offset,
        len(stored.frame),
        tick,
        stored.seal_id.encode(),
        checksum,
    )
    packed = bytearray(fixed + name.namespace + name.key + tenant)
    packed += xxhash.xxh3_64_digest(packed)
    packed[STATE_OFFSET] = LIVE
    return bytes(packed)


def read_entries(index: bytes) -> Iterator[Entry]:
    """The whole entries of an index file's content, its head included."""
    at = index.find(_ENTRY_MAGIC, HEAD.size)
    while at >= 0:
        entry = read_entry(index, at)
        if entry is not None:
            yield entry
        after = at + 1 if entry is None else at + entry.entry_bytes
        at = index.find(_ENTRY_MAGIC, after)


def read_entry(index: bytes, at: int) -> Entry | None:
    """The entry at that offset; None: there is no whole one."""
    if len(index) - at < _ENTRY.size:
        return None
    (_, state, loss_rank, element, namespace_size, key_size, tenant_size, *rest) = (
        _ENTRY.unpack_from(index, at)
    )
    channels, position, raw_bytes, offset, frame_bytes, tick, seal_id, checksum = rest
    names = at + _ENTRY.size
    end = names + namespace_size + key_size + tenant_size
    covered = bytearray(index[at:end])
    covered[STATE_OFFSET] = DEAD
    if xxhash.xxh3_64_digest(covered) != index[end : end + _CHECKSUM_BYTES]:
        return None
    key = names + namespace_size
    tenant = key + key_size
    try:
        return Entry(
            ChunkKey(index[names:key], index[key:tenant], index[tenant:end].decode()),
            ChunkLayout(ELEMENTS[element], channels, position=position),
            raw_bytes,
            LOSSES[loss_rank],
            seal_id.rstrip(b"\0").decode("ascii"),
            offset,
            frame_bytes,
            checksum,
            tick,
            state == LIVE,
            at,
            end + _CHECKSUM_BYTES - at,
        )
    except (CodecError, IndexError, UnicodeDecodeError):
        return None
