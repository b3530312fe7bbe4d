"""The bytes of a delta: a header, msgpack metadata, a checksum, then frames.

All integers are little-endian.

====== ===== ==================================================================================
offset bytes field
====== ===== ==================================================================================
0      4     magic, ``MCPD``
4      1     format version, 2
5      3     zero
8      8     size of the delta
16     4     size M of the metadata
20     4     number of frames
24     M     metadata: the msgpack array of `Metadata`
24+M   8     xxh3_64 of all bytes before this, canonical byte order
32+M         frames (mcp_vllm/codec/frame.py), without padding; the key of each is its number
====== ===== ==================================================================================

What the frames hold follows from the metadata alone (frames.py).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import xxhash
from msgspec import Meta

from mcp_vllm.codec import ChunkLayout
from mcp_vllm.codec.loss import LOSSES
from mcp_vllm.session.delta.arrays import (
    DIGEST_BYTES,
    MAX_DIMENSIONS,
    MAX_NAME_CHARS,
    Library,
    element_size,
    is_known_type,
    layout_of,
    size_bytes,
)
from mcp_vllm.session.delta.errors import DamagedDeltaError
from mcp_vllm.session.delta.overlap import Overlap

MAGIC = b"MCPD"
VERSION = 2
MAX_ARRAYS = 1 << 16
MAX_METADATA_BYTES = 32 << 20

_HEADER = struct.Struct("<4sB3sQII")
_CHECKSUM_BYTES = 8

Name = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Size = Annotated[int, Meta(ge=0, le=1 << 48)]


class ChangedArray(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """An array that is new, or differs from its base.

    Along ``axis`` its first ``kept`` positions are the base's from ``start`` on; the rest is coded.
    ``digest`` is that of the whole array (HostArray.digest).
    """

    name: Name
    library: Library
    dtype: Annotated[str, Meta(max_length=32)]
    shape: Annotated[tuple[Size, ...], Meta(max_length=MAX_DIMENSIONS)]
    axis: Size
    start: Size
    kept: Size
    digest: Digest

    @property
    def overlap(self) -> Overlap:
        return Overlap(self.axis, self.start, self.kept)

    @property
    def coded_shape(self) -> tuple[int, ...]:
        """The shape of what the base lacks."""
        if not self.kept:
            return self.shape
        coded = self.shape[self.axis] - self.kept
        return (*self.shape[: self.axis], coded, *self.shape[self.axis + 1 :])

    @property
    def coded_bytes(self) -> int:
        return size_bytes(self.dtype, self.coded_shape)

    @property
    def layout(self) -> ChunkLayout:
        return layout_of(self.dtype, self.coded_shape)


class Metadata(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """``base`` has the digest of every array of the base; what is neither removed nor changed
    stays as it is. ``loss``: what was coded may be off by as much as this tier allows (loss.py).
    """

    base: Annotated[dict[Name, Digest], Meta(max_length=MAX_ARRAYS)]
    removed: Annotated[list[Name], Meta(max_length=MAX_ARRAYS)]
    changed: Annotated[list[ChangedArray], Meta(max_length=MAX_ARRAYS)]
    loss: Literal[LOSSES]  # type: ignore[valid-type]


_decoder = msgspec.msgpack.Decoder(Metadata)


def pack(metadata: Metadata, frames: Sequence[bytes]) -> bytes:
    """The whole delta."""
    body = msgspec.msgpack.encode(metadata)
    if len(body) > MAX_METADATA_BYTES:
        raise DamagedDeltaError(f"metadata of {len(body)} bytes exceed {MAX_METADATA_BYTES}")
    total = _HEADER.size + len(body) + _CHECKSUM_BYTES + sum(map(len, frames))
    head = _HEADER.pack(MAGIC, VERSION, bytes(3), total, len(body), len(frames)) + body
    return b"".join([head, xxhash.xxh3_64_digest(head), *frames])


def unpack(delta: memoryview, *, max_bytes: int) -> tuple[Metadata, memoryview, int]:
    """Metadata, the frames' bytes, and their number; DamagedDeltaError if anything is off.

    ``max_bytes`` bounds the changed arrays, by the shapes they claim: nothing is allocated here.
    """
    if len(delta) < _HEADER.size:
        raise DamagedDeltaError(f"{len(delta)} bytes are too few for a delta")
    magic, version, zero, total, metadata_size, num_frames = _HEADER.unpack_from(delta)
    if magic != MAGIC:
        raise DamagedDeltaError(f"not a delta: starts with {magic.hex()}")
    if version != VERSION:
        raise DamagedDeltaError(f"delta version {version} is not {VERSION}; update the older peer")
    end = _HEADER.size + metadata_size
    if any(zero) or total != len(delta) or metadata_size > MAX_METADATA_BYTES:
        raise DamagedDeltaError(f"delta is {len(delta)} bytes long, its header says {total}")
    if end + _CHECKSUM_BYTES > len(delta):
        raise DamagedDeltaError("the delta's metadata is truncated")
    frames_at = end + _CHECKSUM_BYTES
    if xxhash.xxh3_64_digest(delta[:end]) != delta[end:frames_at]:
        raise DamagedDeltaError("the delta's metadata does not match its checksum")
    try:
        metadata = _decoder.decode(delta[_HEADER.size : end])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise DamagedDeltaError(f"the delta's metadata does not parse: {error}") from error
    _check(metadata, max_bytes)
    return metadata, delta[frames_at:], num_frames


def _check(metadata: Metadata, max_bytes: int) -> None:
    """Everything about the metadata that needs no base."""
    names = [array.name for array in metadata.changed]
    removed = set(metadata.removed)
    if len(set(names)) != len(names) or not removed <= metadata.base.keys() - set(names):
        raise DamagedDeltaError("the delta names an array twice, or removes one that is not there")
    claimed = 0
    for array in metadata.changed:
        if not is_known_type(array.dtype):
            raise DamagedDeltaError(f"{array.name} is of an unknown type {array.dtype!r}")
        # Axes of length 0 count as 1: no array library takes a shape that is huge otherwise.
        claimed += math.prod(max(1, size) for size in array.shape) * element_size(array.dtype)
        if claimed > max_bytes:
            raise DamagedDeltaError(
                f"the delta's arrays claim more than the {max_bytes} bytes allowed, "
                f"{array.name} alone is {list(array.shape)}"
            )
        if array.kept and not (
            array.axis < len(array.shape) and array.kept <= array.shape[array.axis]
        ):
            raise DamagedDeltaError(f"{array.name} keeps more of its base than it holds")
