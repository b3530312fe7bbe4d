"""A frame as it lies in the shared store: an entry as on disk (`store.disk.entry`), then the frame.

The entry names the chunk, so a value that lies under the wrong key is a miss; it has the frame's
size and checksum, so one that was cut short or changed is damaged, and never served. The server's
keys are digests: they tell nobody a tenant's name or a block's hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import xxhash

from mcp_vllm.store.disk import StoredFrame
from mcp_vllm.store.disk.entry import Entry, entry_bytes, pack_entry, read_entry
from mcp_vllm.store.ram import ChunkKey

PREFIX = b"mcp_vllm:chunk:1:"
DIGEST_BYTES = 20


class DamagedValue(Exception):
    """What lies there is not what it says it is."""


def server_key(name: ChunkKey) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in (name.namespace, name.key, name.tenant.encode()):
        digest.update(len(part).to_bytes(4, "big") + part)
    return PREFIX + digest.digest()


def pack_value(stored: StoredFrame) -> Sequence[bytes]:
    """The value, in parts."""
    checksum = xxhash.xxh3_128_digest(stored.frame)
    return pack_entry(stored, 0, checksum, 0), stored.frame


def head_bytes(name: ChunkKey) -> int:
    """How many bytes of the value say what it holds."""
    return entry_bytes(name)


def read_head(name: ChunkKey, head: bytes) -> Entry | None:
    """What the value holds; None where it is not this chunk's."""
    entry = read_entry(head, 0)
    return entry if entry is not None and entry.name == name else None


def read_value(name: ChunkKey, value: bytes) -> tuple[Entry, bytes]:
    """What a whole value holds, and its frame. Raises DamagedValue."""
    entry = read_head(name, value)
    if entry is None:
        raise DamagedValue("it does not say that it is this chunk")
    frame = value[entry.entry_bytes :]
    if len(frame) != entry.frame_bytes or xxhash.xxh3_128_digest(frame) != entry.checksum:
        raise DamagedValue("its frame is not whole")
    return entry, frame
