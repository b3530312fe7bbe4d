"""The bytes of a cache export: a header, msgpack metadata, a checksum, then a delta.

All integers are little-endian.

====== ===== ==================================================================================
offset bytes field
====== ===== ==================================================================================
0      4     magic, ``MCPH``
4      1     format version, 1
5      3     zero
8      4     size M of the metadata
12     M     metadata: the msgpack array of `CacheState`
12+M   8     xxh3_64 of all bytes before this, canonical byte order
20+M         the delta (mcp_vllm/session/delta/wire.py)
====== ===== ==================================================================================
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import xxhash
from msgspec import Meta

from mcp_vllm.hf.errors import DamagedCacheError
from mcp_vllm.hf.layers import LayerState
from mcp_vllm.session.fingerprint import MAX_FIELDS, MAX_VALUE_CHARS

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"MCPH"
VERSION = 1
MAX_METADATA_BYTES = 1 << 20
MAX_LAYERS = 4096

_HEADER = struct.Struct("<4sB3sI")
_CHECKSUM_BYTES = 8

FieldName = Annotated[str, Meta(max_length=64)]
FieldValue = Annotated[str, Meta(max_length=MAX_VALUE_CHARS)]


class CacheState(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Everything about a cache but its tensors; ``model`` holds Fingerprint.fields."""

    model: Annotated[dict[FieldName, FieldValue], Meta(max_length=MAX_FIELDS)]
    cache: Literal["dynamic", "static"]
    layers: Annotated[list[LayerState], Meta(max_length=MAX_LAYERS)]
    has_token_ids: bool


_decoder = msgspec.msgpack.Decoder(CacheState)


def pack(state: CacheState, delta: bytes) -> bytes:
    """The whole export."""
    body = msgspec.msgpack.encode(state)
    head = _HEADER.pack(MAGIC, VERSION, bytes(3), len(body)) + body
    return b"".join([head, xxhash.xxh3_64_digest(head), delta])


def unpack(data: Buffer) -> tuple[CacheState, memoryview]:
    """The state, and the delta's bytes; DamagedCacheError if the former is not intact."""
    source = memoryview(data).cast("B")
    if len(source) < _HEADER.size:
        raise DamagedCacheError(f"{len(source)} bytes are too few for a cache export")
    magic, version, zero, size = _HEADER.unpack_from(source)
    if magic != MAGIC:
        raise DamagedCacheError(f"not a cache export: starts with {magic.hex()}")
    if version != VERSION:
        raise DamagedCacheError(f"cache export of version {version}, not {VERSION}; update")
    end = _HEADER.size + size
    if any(zero) or size > MAX_METADATA_BYTES or end + _CHECKSUM_BYTES > len(source):
        raise DamagedCacheError("the cache export is truncated or damaged")
    if xxhash.xxh3_64_digest(source[:end]) != source[end : end + _CHECKSUM_BYTES]:
        raise DamagedCacheError("the cache export does not match its checksum")
    try:
        state = _decoder.decode(source[_HEADER.size : end])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise DamagedCacheError(f"the cache export does not parse: {error}") from error
    return state, source[end + _CHECKSUM_BYTES :]
