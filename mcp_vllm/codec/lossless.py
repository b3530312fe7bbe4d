"""``lossless``: exponents entropy-coded by the statistics of their channel, the rest stored.

A float is rotated left by one bit, which leaves the exponent as its highest byte (bf16, f32; with
the first mantissa bits for f16, with all bits for f8) and the sign as its lowest bit. The highest
bytes are the *symbols*; the other bytes are planes of nearly incompressible *residuals*.

Symbols are grouped into cells (cells.py), cells of similar mean into at most 16 classes, and each
class gets a static rANS table (rans.py). Parts of an encoded chunk:

1. uint32 size of the head, then the head compressed by zstandard: uint32 channels; uint8 number of
   classes; uint8 first and last symbol that occur; the grid of each unit (uint8); the class of each
   cell (4 bits: those of the first half of the cells are the low ones of each byte); per class the
   frequencies from the first symbol to the last (uint16)
2. rANS (rans.py), with many lanes from MANY_LANES_FROM symbols on
3. a part for each residual byte of the element, lowest first: stored, or zstandard if smaller
4. the bytes after the last whole element, if any

Chunks without floats (u8), or too short to carry tables, take the path of the `zstd` codec and have
one part. Integers are little-endian.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mcp_vllm.codec import cells, rans
from mcp_vllm.codec.base import Codec, Encoded, flat_bytes
from mcp_vllm.codec.byte_planes import (
    DEFAULT_LEVEL,
    BytePlaneZstdCodec,
    compressor,
    decompress_exactly,
)
from mcp_vllm.codec.errors import FrameError
from mcp_vllm.codec.kernel import UInt8s, UInt16s, kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from mcp_vllm.codec.layout import ChunkLayout, Element

MAX_CLASSES = 16
# Below this, states and tables weigh more than they save.
MIN_SYMBOLS = 1024
SYMBOLS_PER_CLASS = 1024
# Below this, so many states would weigh more than speed is worth.
MANY_LANES_FROM = 1 << 15
# Symbols further below the largest of their cell count as this far below when cells are compared.
TRIM_BINADES = 3
# How much the symbol of a value grows when the value doubles; f8 is taken as e4m3.
_BINADE: dict[Element, int] = {"bf16": 1, "f32": 1, "f16": 8, "f8": 16}

_HEAD = struct.Struct("<IBBB")
_ROTATED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
# Scratch of a thread is kept between chunks up to this size: fresh pages cost as much as a pass.
_MAX_KEPT_BYTES = 8 << 20
_per_thread = threading.local()


def _scratch(purpose: str, num_bytes: int) -> UInt8s:
    """uint8 [num_bytes] of this thread, with any content; valid until it is asked for again."""
    kept: UInt8s | None = getattr(_per_thread, purpose, None)
    if kept is None or kept.size < num_bytes:
        kept = np.empty(num_bytes, np.uint8)
        if num_bytes <= _MAX_KEPT_BYTES:
            setattr(_per_thread, purpose, kept)
    return kept[:num_bytes]


@kernel(
    "(Array(uint8, 1, 'C', readonly=True), uint8[::1], uint8[:,::1])",
    "(Array(uint16, 1, 'C', readonly=True), uint8[::1], uint8[:,::1])",
    "(Array(uint32, 1, 'C', readonly=True), uint8[::1], uint8[:,::1])",
)
def _split(elements: NDArray[Any], symbols: UInt8s, residuals: UInt8s) -> None:
    """Rotate left by one bit; highest byte to ``symbols``, the others to [byte, element]."""
    bits = np.uint32(8 * elements.itemsize)
    one = np.uint32(1)
    for index in range(elements.size):
        value = np.uint32(elements[index])
        rotated = (value << one) | (value >> (bits - one))
        symbols[index] = np.uint8(rotated >> (bits - np.uint32(8)))
    for byte in range(elements.itemsize - 1):
        shift = np.uint32(8 * byte)
        plane = residuals[byte]
        for index in range(elements.size):
            value = np.uint32(elements[index])
            rotated = (value << one) | (value >> (bits - one))
            plane[index] = np.uint8(rotated >> shift)


@kernel(
    "(Array(uint8, 1, 'C', readonly=True), UniTuple(Array(uint8, 1, 'C', readonly=True), 3),"
    " uint8[::1])",
    "(Array(uint8, 1, 'C', readonly=True), UniTuple(Array(uint8, 1, 'C', readonly=True), 3),"
    " uint16[::1])",
    "(Array(uint8, 1, 'C', readonly=True), UniTuple(Array(uint8, 1, 'C', readonly=True), 3),"
    " uint32[::1])",
)
def _merge(
    symbols: UInt8s, residuals: tuple[UInt8s, UInt8s, UInt8s], elements: NDArray[Any]
) -> None:
    """The inverse of _split; of ``residuals`` only the element's own are read."""
    one, eight = np.uint32(1), np.uint32(8)
    low, middle, high = residuals
    for index in range(elements.size):
        rotated = np.uint32(symbols[index])
        if elements.itemsize == 2:
            rotated = (rotated << eight) | np.uint32(low[index])
        elif elements.itemsize == 4:
            rotated = (rotated << eight) | np.uint32(high[index])
            rotated = (rotated << eight) | np.uint32(middle[index])
            rotated = (rotated << eight) | np.uint32(low[index])
        bits = np.uint32(8 * elements.itemsize)
        elements[index] = (rotated >> one) | (rotated << (bits - one))


def _aligned(buffer: memoryview, dtype: Any) -> NDArray[Any]:
    """The buffer as an array of little-endian ``dtype``; a copy only where a CPU load needs one."""
    return np.require(np.frombuffer(buffer, dtype), requirements="A")


@dataclass(frozen=True)
class _Head:
    """What the decoder must know before the first symbol.

    ``grids`` uint8 [unit], ``cell_classes`` uint8 [cell], ``frequencies`` uint16 [class, symbol
    from ``first_symbol`` on].
    """

    channels: int
    grids: UInt8s
    cell_classes: UInt8s
    frequencies: UInt16s
    first_symbol: int = 0

    def pack(self, level: int) -> bytes:
        present = np.flatnonzero(self.frequencies.any(axis=0))
        first, last = int(present[0]), int(present[-1])
        packed = np.empty((self.cell_classes.size + 1) // 2, np.uint8)
        cells.pack_classes(self.cell_classes, packed)
        head = b"".join(
            [
                _HEAD.pack(self.channels, len(self.frequencies), first, last),
                self.grids.tobytes(),
                packed.tobytes(),
                self.frequencies[:, first : last + 1].tobytes(),
            ]
        )
        return struct.pack("<I", len(head)) + compressor(level).compress(head)

    @classmethod
    def unpack(cls, part: memoryview, num_symbols: int) -> _Head:
        """Parse an untrusted head; FrameError unless every index in it can be followed blindly.

        Whether frequencies add up, the decoding table tells.
        """
        fields = _Fields(_decompress_head(part, num_symbols))
        channels, num_classes, first, last = _HEAD.unpack(fields.take(_HEAD.size))
        if not 1 <= num_classes <= MAX_CLASSES:
            raise FrameError(f"lossless part declares {num_classes} classes")
        if channels != cells.unit_channels(channels, num_symbols):
            raise FrameError(f"lossless part declares {channels} channels")
        grids = np.frombuffer(fields.take(cells.num_units(num_symbols, channels)), np.uint8)
        if not cells.all_below(grids, cells.NUM_GRIDS):
            raise FrameError("lossless part names an unknown grid")
        num_cells = cells.num_cells(grids, channels, num_symbols)
        packed = np.frombuffer(fields.take((num_cells + 1) // 2), np.uint8)
        cell_classes = np.empty(num_cells, np.uint8)
        cells.unpack_classes(packed, cell_classes)
        if not cells.all_below(cell_classes, num_classes):
            raise FrameError("lossless part names a class without a table")
        num_present = max(0, last + 1 - first)
        tables = np.frombuffer(fields.take(2 * num_classes * num_present), np.uint16)
        if fields.remaining:
            raise FrameError("lossless part is longer than its content")
        frequencies = np.require(tables, requirements="A").reshape(num_classes, num_present)
        return cls(channels, grids, cell_classes, frequencies, first)


class _Fields:
    """Takes byte fields off the front of a buffer; FrameError past its end."""

    def __init__(self, buffer: bytes) -> None:
        self._buffer = buffer
        self._position = 0

    @property
    def remaining(self) -> int:
        return len(self._buffer) - self._position

    def take(self, size: int) -> bytes:
        if size > self.remaining:
            raise FrameError("lossless part is truncated")
        field = self._buffer[self._position : self._position + size]
        self._position += size
        return field


def _decompress_head(part: memoryview, num_symbols: int) -> bytes:
    if len(part) < 4:
        raise FrameError("lossless part is truncated")
    (size,) = struct.unpack_from("<I", part)
    # Grids and half a byte for each cell, of which there are fewer than symbols, and the tables.
    if size > 2 * num_symbols + MAX_CLASSES * 1024:
        raise FrameError(f"lossless part claims a head of {size} bytes")
    return decompress_exactly(part[4:], size)


def _class_step(num_cells: int, num_symbols: int, binade: int) -> float:
    """How far apart the means of classes are at least: 1 binade for cells of 16 symbols, 1/2 for
    64 and more. A finer class of a small cell would cost more than it saves.
    """
    return float(binade * min(1.0, max(0.5, 4.0 * np.sqrt(num_cells / num_symbols))))


class LosslessCodec(Codec):
    """See the module's docstring. ``level`` is zstandard's, for what rANS does not code."""

    name = "lossless"
    codec_id = 2
    lossless = True

    def __init__(self, level: int = DEFAULT_LEVEL) -> None:
        self._byte_planes = BytePlaneZstdCodec(level)
        self._level = level

    def encode(self, raw: Buffer, layout: ChunkLayout) -> Encoded:
        source = flat_bytes(raw)
        width = layout.element_size_bytes
        num_symbols = len(source) // width
        if not _has_symbols(layout, num_symbols):
            return Encoded(self, self._byte_planes.encode(source, layout).parts)
        elements = _aligned(source[: num_symbols * width], _ROTATED[width])
        symbols = _scratch("symbols", num_symbols)
        residuals = np.empty((width - 1, num_symbols), np.uint8)  # Parts themselves, so no scratch.
        _split(elements, symbols, residuals)
        parts = self._encode_symbols(symbols, layout.channels, _BINADE[layout.element])
        parts += [self._encode_residual(plane) for plane in residuals]
        tail = source[num_symbols * width :]
        return Encoded(self, [*parts, tail] if tail else parts)

    def _encode_symbols(self, symbols: UInt8s, channels: int, binade: int) -> list[Buffer]:
        channels = cells.unit_channels(channels, symbols.size)
        grids = np.empty(cells.num_units(symbols.size, channels), np.uint8)
        cells.choose_grids(symbols, channels, TRIM_BINADES * binade, grids)
        num_cells = cells.num_cells(grids, channels, symbols.size)
        means = np.empty(num_cells, np.float32)
        cells.measure_cells(symbols, grids, channels, TRIM_BINADES * binade, means)
        cell_classes = np.empty(num_cells, np.uint8)
        num_classes = cells.classify(
            means,
            _class_step(num_cells, symbols.size, binade),
            min(MAX_CLASSES, symbols.size // SYMBOLS_PER_CLASS),
            cell_classes,
        )
        classes = _scratch("classes", symbols.size)
        cells.spread_classes(cell_classes, grids, channels, classes)
        counts = np.empty((num_classes, 256), np.uint32)
        cells.count_symbols(symbols, classes, counts)
        frequencies = np.empty(counts.shape, np.uint16)
        rans.normalize(counts, frequencies)
        words = _scratch("words", 2 * rans.most_words(symbols.size)).view(np.uint16)
        start = rans.encode(symbols, classes, frequencies, _num_lanes(symbols.size), words)
        head = _Head(channels, grids, cell_classes, frequencies)
        return [head.pack(self._level), words[start:].tobytes()]

    def _encode_residual(self, plane: UInt8s) -> Buffer:
        if _looks_random(plane):
            return plane.data
        compressed = compressor(self._level).compress(plane.data)
        return compressed if len(compressed) < plane.size else plane.data

    def decode_into(self, parts: Sequence[Buffer], out: memoryview, layout: ChunkLayout) -> None:
        width = layout.element_size_bytes
        num_symbols = len(out) // width
        if not _has_symbols(layout, num_symbols):
            self._byte_planes.decode_into(parts, out, layout)
            return
        views = [flat_bytes(part) for part in parts]
        tail = len(out) - num_symbols * width
        if len(views) != 1 + width + bool(tail):
            raise FrameError(f"lossless frame holds {len(views)} parts")
        if tail:
            if len(views[-1]) != tail:
                raise FrameError("lossless frame lacks its last bytes")
            out[-tail:] = views[-1]
        residuals = [_decode_residual(view, num_symbols) for view in views[2 : 1 + width]]
        elements = np.frombuffer(out[: num_symbols * width], _ROTATED[width])
        if elements.flags.aligned:
            _decode_elements(views[0], views[1], residuals, elements)
        else:
            aligned = np.empty(num_symbols, _ROTATED[width])
            _decode_elements(views[0], views[1], residuals, aligned)
            np.copyto(elements, aligned)


def _has_symbols(layout: ChunkLayout, num_symbols: int) -> bool:
    return layout.element != "u8" and num_symbols >= MIN_SYMBOLS


def _num_lanes(num_symbols: int) -> int:
    return rans.MANY_LANES if num_symbols >= MANY_LANES_FROM else rans.FEW_LANES


def _looks_random(plane: UInt8s) -> bool:
    """Whether a sample of the plane has an entropy so near 8 bits that zstandard would lose."""
    sample = plane[:: max(1, plane.size // 4096)]
    counts = np.bincount(sample, minlength=256)
    present = counts[counts > 0] / sample.size
    return float(-(present * np.log2(present)).sum()) > 7.5


def _decode_elements(
    head_part: memoryview, rans_part: memoryview, residuals: list[UInt8s], elements: NDArray[Any]
) -> None:
    head = _Head.unpack(head_part, elements.size)
    if len(rans_part) % 2:
        raise FrameError("lossless part holds no whole rANS stream")
    classes = _scratch("classes", elements.size)
    cells.spread_classes(head.cell_classes, head.grids, head.channels, classes)
    table = _scratch("table", 4 * len(head.frequencies) * rans.TABLE_SIZE).view(np.uint32)
    if not rans.build_decoding_table(head.frequencies, head.first_symbol, table):
        raise FrameError("lossless part holds a table that does not add up")
    stream = _aligned(rans_part, np.uint16)
    decoder = rans.Decoder(stream, classes, table, _num_lanes(elements.size))
    if decoder.has_vectors and elements.itemsize == 2:
        decoder.whole_elements(residuals[0], elements)
    first = decoder.num_decoded
    symbols = _scratch("symbols", elements.size)
    if not decoder.rest(symbols):
        raise FrameError("lossless part holds a damaged rANS stream")
    if first < elements.size:
        empty = np.empty(0, np.uint8)
        low, middle, high = [*(plane[first:] for plane in residuals), empty, empty, empty][:3]
        _merge(symbols[first:], (low, middle, high), elements[first:])


def _decode_residual(part: memoryview, num_symbols: int) -> UInt8s:
    if len(part) == num_symbols:
        return np.frombuffer(part, np.uint8)
    return np.frombuffer(decompress_exactly(part, num_symbols), np.uint8)
