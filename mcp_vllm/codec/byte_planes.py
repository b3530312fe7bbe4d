"""``zstd``: byte planes by element width, then zstandard.

Bytes of equal significance go next to each other (all exponents of a bf16 chunk, then all
mantissas), so zstandard sees the redundancy it misses in interleaved floats. The general-purpose
codec: works for any bytes, and is what `lossless` hands element types without an exponent to.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import zstandard

from mcp_vllm.codec.base import Codec, Encoded, flat_bytes
from mcp_vllm.codec.errors import CodecError, FrameError
from mcp_vllm.codec.layout import ChunkLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

DEFAULT_LEVEL = 3
LEVELS = range(1, 23)

# zstandard's contexts are not thread-safe, and cost more to make than a small chunk to code.
_per_thread = threading.local()


def compressor(level: int) -> zstandard.ZstdCompressor:
    """This thread's compressor of that level; its frames declare their content size."""
    compressors: dict[int, zstandard.ZstdCompressor] = _per_thread.__dict__.setdefault(
        "by_level", {}
    )
    if level not in compressors:
        compressors[level] = zstandard.ZstdCompressor(level=level, write_content_size=True)
    return compressors[level]


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_per_thread, "decompressor"):
        _per_thread.decompressor = zstandard.ZstdDecompressor()
    decompressor: zstandard.ZstdDecompressor = _per_thread.decompressor
    return decompressor


def decompress_exactly(blob: memoryview, size_bytes: int) -> bytes:
    """One zstandard frame that decompresses to exactly ``size_bytes``; FrameError otherwise.

    The size the blob claims is compared before anything is allocated, so a bomb costs nothing.
    """
    try:
        claimed = zstandard.get_frame_parameters(blob).content_size
        if claimed != size_bytes:
            raise FrameError(f"zstandard part claims {claimed} bytes where {size_bytes} belong")
        raw = _decompressor().decompress(blob, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FrameError(f"zstandard part does not decompress: {error}") from error
    if len(raw) != size_bytes:
        raise FrameError(f"zstandard part gave {len(raw)} bytes where {size_bytes} belong")
    return raw


def _split_planes(raw: memoryview, width: int) -> memoryview:
    """[element, byte] to [byte, element]; bytes past the last whole element stay at the end."""
    num_elements = len(raw) // width
    whole = num_elements * width
    source = np.frombuffer(raw, np.uint8)
    planes = np.empty(len(raw), np.uint8)
    elements = source[:whole].reshape(num_elements, width)
    for byte in range(width):
        planes[byte * num_elements : (byte + 1) * num_elements] = elements[:, byte]
    planes[whole:] = source[whole:]
    return planes.data


def _merge_planes(planes: bytes, out: memoryview, width: int) -> None:
    """The inverse of _split_planes, straight into ``out``."""
    num_elements = len(out) // width
    whole = num_elements * width
    source = np.frombuffer(planes, np.uint8)
    target = np.frombuffer(out, np.uint8)
    elements = target[:whole].reshape(num_elements, width)
    for byte in range(width):
        elements[:, byte] = source[byte * num_elements : (byte + 1) * num_elements]
    target[whole:] = source[whole:]


class BytePlaneZstdCodec(Codec):
    """One part: the zstandard frame of the byte planes."""

    name = "zstd"
    codec_id = 1
    lossless = True

    def __init__(self, level: int = DEFAULT_LEVEL) -> None:
        if level not in LEVELS:
            raise CodecError(f"zstd level {level} is outside {LEVELS[0]}..{LEVELS[-1]}")
        self._level = level

    def encode(self, raw: Buffer, layout: ChunkLayout) -> Encoded:
        source = flat_bytes(raw)
        width = layout.element_size_bytes
        planes = source if width == 1 else _split_planes(source, width)
        return Encoded(self, [compressor(self._level).compress(planes)])

    def decode_into(self, parts: Sequence[Buffer], out: memoryview, layout: ChunkLayout) -> None:
        if len(parts) != 1:
            raise FrameError(f"a zstd frame holds one part, not {len(parts)}")
        planes = decompress_exactly(flat_bytes(parts[0]), out.nbytes)
        if layout.element_size_bytes == 1:
            out[:] = planes
        else:
            _merge_planes(planes, out, layout.element_size_bytes)
