"""Matrices of small integers as an entropy-coded stream; the class of each column is known.

Values of a *wide* column, which would not fit a byte, are coded as ``16 * high + low - 8``:
``high`` like any value, ``low`` in a column of its own after the others. What has no byte in its
class is an *escape*: int16, in the order of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mcp_vllm.codec import rans
from mcp_vllm.codec.errors import FrameError
from mcp_vllm.codec.kernel import Float32s, UInt8s, UInt32s, kernel
from mcp_vllm.codec.tables import Tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOW_VALUES = 16
_HALF = 8
_LARGEST_ESCAPE = 32767
# Streams of fewer symbols are so short that the states would show in the ratio.
MANY_LANES_FROM = 1 << 18


@dataclass(frozen=True)
class Moves:
    """Which classes a column may be moved to in a row that spreads more or less than usual.

    Attributes: all as Columns.classes.
        first, last: uint8, the classes at both ends.
        groups: int64, which of a row's shifts moves the column.
    """

    first: UInt8s
    last: UInt8s
    groups: NDArray[np.int64]


@dataclass(frozen=True)
class Columns:
    """How the columns of a matrix are coded.

    Attributes:
        classes: uint8 [column, then one for the low values of each wide column], rows of tables.
        lows: int64 [column], where the low values of a wide column are, or -1.
        moves: None where a column has the same class in all rows.
    """

    classes: UInt8s
    lows: NDArray[np.int64]
    tables: Tables
    moves: Moves | None = None

    @cached_property
    def decoding_table(self) -> UInt32s:
        table = np.empty(len(self.tables.frequencies) * rans.TABLE_SIZE, np.uint32)
        rans.build_decoding_table(self.tables.frequencies, 0, table)
        return table

    def classes_of(self, num_rows: int, shifts: NDArray[np.int8] | None) -> UInt8s:
        """The class of each symbol: uint8 [row, as ``classes``]; shifts [row, group]."""
        moves = self.moves
        if shifts is None or moves is None:
            return np.tile(self.classes, (num_rows, 1))
        classes = np.empty((num_rows, len(self.classes)), np.uint8)
        _shift(self.classes, moves.first, moves.last, moves.groups, shifts, classes)
        return classes


@kernel(
    "(Array(uint8, 1, 'C', readonly=True), Array(uint8, 1, 'C', readonly=True),"
    " Array(uint8, 1, 'C', readonly=True), Array(int64, 1, 'C', readonly=True),"
    " Array(int8, 2, 'C', readonly=True), uint8[:,::1])"
)
def _shift(
    usual: UInt8s,
    first: UInt8s,
    last: UInt8s,
    groups: NDArray[np.int64],
    shifts: NDArray[np.int8],
    classes: UInt8s,
) -> None:
    for row in range(shifts.shape[0]):
        for column in range(usual.size):
            moved = np.int64(usual[column]) + np.int64(shifts[row, groups[column]])
            least, most = np.int64(first[column]), np.int64(last[column])
            classes[row, column] = np.uint8(min(max(moved, least), most))


@kernel(
    "int64(Array(float32, 2, 'C', readonly=True), float32, Array(uint8, 2, 'C', readonly=True),"
    " Array(int64, 1, 'C', readonly=True), Array(int64, 1, 'C', readonly=True), uint8[:,::1],"
    " int16[::1])"
)
def _to_symbols(
    values: Float32s,
    rounding: float,
    classes: UInt8s,
    lows: NDArray[np.int64],
    limits: NDArray[np.int64],
    symbols: UInt8s,
    escapes: NDArray[np.int16],
) -> int:
    """Round to integers; returns the number of escapes, or -1 when a value is beyond them."""
    num_escapes = 0
    bound = np.float32(_LARGEST_ESCAPE)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            value = values[row, column]
            if not abs(value) <= bound:
                return -1
            magnitude = np.int64(abs(value) + rounding)
            integer = -magnitude if value < 0 else magnitude
            low = lows[column]
            if low >= 0:
                symbols[row, low] = np.uint8((integer + _HALF) & (LOW_VALUES - 1))
                integer = (integer + _HALF) >> 4
            if abs(integer) <= limits[classes[row, column]]:
                symbols[row, column] = np.uint8(integer + 128)
            else:
                symbols[row, column] = np.uint8(0)
                escapes[num_escapes] = integer
                num_escapes += 1
    return num_escapes


@kernel(
    "boolean(Array(uint8, 2, 'C', readonly=True), Array(int64, 1, 'C', readonly=True),"
    " Array(int16, 1, 'C', readonly=True), float32[:,::1])"
)
def _to_values(
    symbols: UInt8s, lows: NDArray[np.int64], escapes: NDArray[np.int16], values: Float32s
) -> bool:
    """The inverse of _to_symbols; False when there are not as many escapes as symbols for them."""
    position = 0
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            symbol = symbols[row, column]
            integer = np.int64(symbol) - 128
            if symbol == 0:
                if position >= escapes.size:
                    return False
                integer = np.int64(escapes[position])
                position += 1
            low = lows[column]
            if low >= 0:
                integer = (integer << 4) + np.int64(symbols[row, low]) - _HALF
            values[row, column] = np.float32(integer)
    return position == escapes.size


def _num_lanes(num_symbols: int) -> int:
    return rans.MANY_LANES if num_symbols >= MANY_LANES_FROM else rans.FEW_LANES


def encode(
    values: Float32s,
    columns: Columns,
    shifts: NDArray[np.int8] | None = None,
    rounding: float = 0.5,
) -> tuple[bytes, bytes] | None:
    """The stream and the escapes of values [row, column], rounded to integers.

    A magnitude is rounded up from ``1 - rounding`` above an integer. None when one of them is not
    finite or does not fit 16 bits.
    """
    symbols = np.empty((len(values), len(columns.classes)), np.uint8)
    escapes = np.empty(values.size, np.int16)
    limits = columns.tables.limits
    classes = columns.classes_of(len(values), shifts)
    num_escapes = _to_symbols(values, rounding, classes, columns.lows, limits, symbols, escapes)
    if num_escapes < 0:
        return None
    words = np.empty(rans.most_words(symbols.size), np.uint16)
    frequencies = columns.tables.frequencies
    num_lanes = _num_lanes(symbols.size)
    start = rans.encode(symbols.ravel(), classes.ravel(), frequencies, num_lanes, words)
    return words[start:].tobytes(), escapes[:num_escapes].tobytes()


def decode(
    stream: memoryview,
    escapes: memoryview,
    num_rows: int,
    columns: Columns,
    shifts: NDArray[np.int8] | None = None,
) -> Float32s:
    """Float32 [row, column]; FrameError when the stream is not one of so many rows."""
    if len(stream) % 2 or len(escapes) % 2:
        raise FrameError("lossy part holds no whole rANS stream")
    symbols = np.empty((num_rows, len(columns.classes)), np.uint8)
    classes = columns.classes_of(num_rows, shifts).ravel()
    words = np.require(np.frombuffer(stream, np.uint16), requirements="A")
    num_lanes = _num_lanes(symbols.size)
    if not rans.Decoder(words, classes, columns.decoding_table, num_lanes).rest(symbols.ravel()):
        raise FrameError("lossy part holds a damaged rANS stream")
    values = np.empty((num_rows, len(columns.lows)), np.float32)
    high = np.require(np.frombuffer(escapes, np.int16), requirements="A")
    if not _to_values(symbols, columns.lows, high, values):
        raise FrameError("lossy part holds too few or too many escapes")
    return values
