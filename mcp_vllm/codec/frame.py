"""The frame: one chunk, encoded, with everything a receiver needs to check and decode it.

All integers are little-endian. The header is followed by the parts, without padding.

====== ===== ==================================================================================
offset bytes field
====== ===== ==================================================================================
0      4     magic, ``MCPF``
4      1     format version, 4
5      1     codec id (registry.py); the codec defines what its parts hold
6      1     element type, an index into layout.ELEMENTS
7      1     number of parts P, 0..12
8      4     channels (ChunkLayout.channels)
12     2     key length K, 0..256
14     2     zero
16     8     raw size
24     8     frame size: header and parts
32     16    xxh3_128, canonical byte order: of the raw bytes where the codec is lossless, else of
             the parts
48     K     key
48+K   8 P   size of each part
48+K+8P 8    xxh3_64 of all header bytes before this, canonical byte order
====== ===== ==================================================================================

A frame is never larger than its header plus the raw bytes, so ``raw size`` bounds everything. The
checksum of a lossy frame covers what was coded, since decoded floats may differ in their last bits
from CPU to CPU; it is verified before anything is decoded. (An encoder that checked its own output
would pay for a decoding, and find only faults of its own.) Checksums guard against accidents, not
against an adversary: authenticity is the transport's matter, but a decoder fed hostile bytes still
raises CodecError only and allocates within that bound.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import msgspec
import xxhash

from mcp_vllm.codec.base import MAX_PARTS, Codec, RawCodec, flat_bytes
from mcp_vllm.codec.errors import ChecksumError, CodecError, FrameError
from mcp_vllm.codec.layout import ELEMENTS, ChunkLayout
from mcp_vllm.codec.registry import codec_name_of_id, get_codec, is_lossless

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from mcp_vllm.codec.calibration import Calibration
    from mcp_vllm.codec.planes import KVLayout

MAGIC = b"MCPF"
VERSION = 4
MAX_KEY_SIZE = 256

_FIXED = struct.Struct("<4sBBBBIHHQQ16s")
_HEADER_CHECKSUM_SIZE = 8
_PART_SIZE_FIELD = 8

# No header is longer than this: with so many bytes of a frame (or all, of a shorter one),
# read_header has what it needs.
FRAME_PREFIX_SIZE = (
    _FIXED.size + MAX_KEY_SIZE + MAX_PARTS * _PART_SIZE_FIELD + _HEADER_CHECKSUM_SIZE
)


class FrameHeader(msgspec.Struct, frozen=True):
    """What a frame says about itself. Sizes are in bytes.

    ``checksum`` is of the raw bytes where ``lossless``, else of the parts. ``layout`` is what the
    frame carries: neither planes nor position.
    """

    version: int
    codec_id: int
    codec_name: str
    key: bytes
    raw_size: int
    frame_size: int
    checksum: bytes
    layout: ChunkLayout
    lossless: bool
    part_sizes: tuple[int, ...]

    @property
    def header_size(self) -> int:
        return self.frame_size - sum(self.part_sizes)


def encode_frame(key: bytes, raw: Buffer, layout: ChunkLayout, codec: Codec) -> bytes:
    """A frame of ``raw``; by the raw codec where ``codec`` would not make it smaller."""
    if len(key) > MAX_KEY_SIZE:
        raise CodecError(
            f"key of {len(key)} bytes is longer than {MAX_KEY_SIZE}: {key[:16].hex()}..."
        )
    source = flat_bytes(raw)
    encoded = codec.encode(source, layout)
    parts = [flat_bytes(part) for part in encoded.parts]
    codec = encoded.codec
    if sum(map(len, parts)) >= len(source):
        parts, codec = [source], RawCodec()
    checksum = xxhash.xxh3_128_digest(source) if codec.lossless else _checksum_of_parts(parts)
    part_sizes = [len(part) for part in parts]
    header = _pack_header(key, len(source), layout, codec.codec_id, part_sizes, checksum)
    return b"".join([header, *parts])


def _checksum_of_parts(parts: list[memoryview]) -> bytes:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _pack_header(
    key: bytes,
    raw_size: int,
    layout: ChunkLayout,
    codec_id: int,
    part_sizes: list[int],
    checksum: bytes,
) -> bytes:
    header_size = _header_size(len(key), len(part_sizes))
    fixed = _FIXED.pack(
        MAGIC,
        VERSION,
        codec_id,
        ELEMENTS.index(layout.element),
        len(part_sizes),
        layout.channels,
        len(key),
        0,
        raw_size,
        header_size + sum(part_sizes),
        checksum,
    )
    header = fixed + key + struct.pack(f"<{len(part_sizes)}Q", *part_sizes)
    return header + xxhash.xxh3_64_digest(header)


def _header_size(key_size: int, num_parts: int) -> int:
    return _FIXED.size + key_size + num_parts * _PART_SIZE_FIELD + _HEADER_CHECKSUM_SIZE


def read_header(frame_prefix: Buffer, *, max_raw_size: int) -> FrameHeader:
    """Parse and check the header of a frame of which at least FRAME_PREFIX_SIZE bytes are here.

    A frame shorter than that is passed whole. Nothing is allocated from a length the header claims
    before it is bounded. Raises FrameError, or ChecksumError if the header was damaged.
    """
    prefix = flat_bytes(frame_prefix)
    if len(prefix) < _FIXED.size:
        raise FrameError(f"{len(prefix)} bytes are too few for a frame header")
    (magic, version, codec_id, element_index, num_parts, channels, key_size, zero, *rest) = (
        _FIXED.unpack_from(prefix)
    )
    raw_size, frame_size, checksum = rest
    if magic != MAGIC:
        raise FrameError(f"not a frame: starts with {magic.hex()}")
    if version != VERSION:
        raise FrameError(f"frame version {version} is not {VERSION}; update the older peer")
    if num_parts > MAX_PARTS or key_size > MAX_KEY_SIZE:
        raise FrameError(
            f"{num_parts} parts or a key of {key_size} bytes exceed the format's bounds"
        )
    header_size = _header_size(key_size, num_parts)
    if len(prefix) < header_size:
        raise FrameError(f"header is truncated: {len(prefix)} of {header_size} bytes")
    body_end = header_size - _HEADER_CHECKSUM_SIZE
    if xxhash.xxh3_64_digest(prefix[:body_end]) != prefix[body_end:header_size]:
        raise ChecksumError("frame header does not match its checksum")
    if zero != 0 or element_index >= len(ELEMENTS) or channels == 0:
        raise FrameError("frame header holds a value outside its range")
    if raw_size > max_raw_size:
        raise FrameError(f"frame claims {raw_size} raw bytes; at most {max_raw_size} are allowed")
    key_end = _FIXED.size + key_size
    part_sizes = struct.unpack(f"<{num_parts}Q", prefix[key_end:body_end])
    if sum(part_sizes) > raw_size or frame_size != header_size + sum(part_sizes):
        raise FrameError("frame size, part sizes and raw size contradict each other")
    return FrameHeader(
        version=version,
        codec_id=codec_id,
        codec_name=codec_name_of_id(codec_id),
        key=bytes(prefix[_FIXED.size : key_end]),
        raw_size=raw_size,
        frame_size=frame_size,
        checksum=checksum,
        layout=ChunkLayout(ELEMENTS[element_index], channels),
        lossless=is_lossless(codec_id),
        part_sizes=part_sizes,
    )


def decode_frame_into(
    frame: Buffer,
    out: memoryview,
    *,
    key: bytes,
    kv: KVLayout | None = None,
    calibration: Calibration | None = None,
) -> FrameHeader:
    """Decode a whole frame of chunk ``key`` straight into ``out``, and verify it.

    ``out`` is writable, contiguous and exactly the raw size. Lossy frames also need the receiver's
    own layout of the chunk, and all but `near-lossless` the sender's calibration. Raises CodecError
    subclasses only; after one, the content of ``out`` is undefined and must not reach an engine.
    """
    source = flat_bytes(frame)
    target = flat_bytes(out)
    if out.readonly:
        raise CodecError("the output buffer is read-only")
    header = read_header(source, max_raw_size=len(target))
    if header.key != key:
        raise FrameError(f"frame holds chunk {header.key.hex()}, not {key.hex()}")
    if header.raw_size != len(target):
        raise FrameError(f"frame holds {header.raw_size} raw bytes, not {len(target)}")
    if header.frame_size != len(source):
        raise FrameError(f"frame is {len(source)} bytes long, its header says {header.frame_size}")
    ends = list(accumulate(header.part_sizes, initial=header.header_size))
    parts = [source[start:end] for start, end in pairwise(ends)]
    if not header.lossless and _checksum_of_parts(parts) != header.checksum:
        raise ChecksumError(f"the parts of chunk {key.hex()} do not match their checksum")
    layout = header.layout if kv is None else replace(header.layout, kv=kv)
    get_codec(header.codec_name, calibration=calibration).decode_into(parts, target, layout)
    if header.lossless and xxhash.xxh3_128_digest(target) != header.checksum:
        raise ChecksumError(f"decoded bytes of chunk {key.hex()} do not match their checksum")
    return header
