"""Entropy coding of bytes by static tables, one per class of bytes: range ANS in lanes.

After J. Duda, "Asymmetric numeral systems" (arXiv:1311.2540), in the interleaved form of F. Giesen
(arXiv:1402.3392): 32-bit states renormalised by 16-bit words. Symbol i belongs to lane i mod L; the
encoder walks backwards, so the decoder reads forwards: the uint32 state of each lane, then the
uint16 words. Hosts are little-endian. L is FEW_LANES, or for long streams MANY_LANES, which AVX-512
machines decode three times faster (rans_vectors.py); a lane costs two bytes.

Invariant: a state is at least 2**16 between symbols, and back at 2**16 when all are decoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mcp_vllm.codec import rans_vectors
from mcp_vllm.codec.kernel import UInt8s, UInt16s, UInt32s, kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEW_LANES = 16
MANY_LANES = rans_vectors.NUM_LANES
TABLE_BITS = 11
TABLE_SIZE = 1 << TABLE_BITS

_BITS = np.uint32(TABLE_BITS)
_SLOT_MASK = np.uint32(TABLE_SIZE - 1)
_STATE_LOW = np.uint32(1 << 16)
_WORD_BITS = np.uint32(16)
_WORD_MASK = np.uint32(0xFFFF)
# A decoding table entry holds, from the lowest bit: symbol (8), frequency - 1 (12), offset (12).
_SYMBOL_MASK = np.uint32(0xFF)
_FREQUENCY_SHIFT = np.uint32(8)
_OFFSET_SHIFT = np.uint32(20)
_ONE = np.uint32(1)


@kernel("(uint32[:,::1], uint16[:,::1])")
def normalize(counts: UInt32s, frequencies: UInt16s) -> None:
    """Scale each row of counts [class, 256] to sum to TABLE_SIZE, no present symbol below 1.

    A row without counts stays all zero.
    """
    for row in range(counts.shape[0]):
        total = 0
        for symbol in range(256):
            total += int(counts[row, symbol])
        if total == 0:
            frequencies[row, :] = 0
            continue
        excess = -TABLE_SIZE
        for symbol in range(256):
            count = int(counts[row, symbol])
            frequency = (count * TABLE_SIZE + total // 2) // total
            if count > 0 and frequency == 0:
                frequency = 1
            frequencies[row, symbol] = frequency
            excess += frequency
        while excess != 0:
            largest = 0
            for symbol in range(1, 256):
                if frequencies[row, symbol] > frequencies[row, largest]:
                    largest = symbol
            # Not more than a quarter at once: the rounding error is shared by the largest few.
            change = min(excess, max(1, int(frequencies[row, largest]) // 4))
            frequencies[row, largest] = int(frequencies[row, largest]) - change
            excess -= change


@kernel("boolean(Array(uint16, 2, 'C', readonly=True), int64, uint32[::1])")
def build_decoding_table(frequencies: UInt16s, first_symbol: int, table: UInt32s) -> bool:
    """Fill table [class * TABLE_SIZE + slot] from frequencies [class, symbol from the first on].

    False, and nothing to rely on, unless those of each class sum to TABLE_SIZE.
    """
    slot = 0
    for row in range(frequencies.shape[0]):
        total = 0
        for column in range(frequencies.shape[1]):
            total += int(frequencies[row, column])
        if total != TABLE_SIZE:
            return False
        for column in range(frequencies.shape[1]):
            frequency = np.uint32(frequencies[row, column])
            entry = np.uint32(first_symbol + column) | ((frequency - _ONE) << _FREQUENCY_SHIFT)
            for offset in range(frequency):
                table[slot] = entry | (np.uint32(offset) << _OFFSET_SHIFT)
                slot += 1
    return True


def most_words(num_symbols: int) -> int:
    """How large a buffer ``encode`` needs, in words."""
    return num_symbols + 2 * MANY_LANES


@kernel(
    "int64(Array(uint8, 1, 'C', readonly=True), Array(uint8, 1, 'C', readonly=True),"
    " Array(uint16, 2, 'C', readonly=True), int64, uint16[::1])"
)
def encode(
    symbols: UInt8s, classes: UInt8s, frequencies: UInt16s, num_lanes: int, words: UInt16s
) -> int:
    """Write states and words to the end of ``words`` [most_words]; return where they start.

    Every symbol must have a frequency in the table of its class. ``num_lanes`` is a power of 2.
    """
    lane_mask = np.uint64(num_lanes - 1)
    flat = frequencies.ravel()
    starts = np.empty(flat.size, np.uint32)
    for row in range(0, flat.size, 256):
        start = np.uint32(0)
        for symbol in range(256):
            starts[row + symbol] = start
            start += np.uint32(flat[row + symbol])
    states = np.full(num_lanes, _STATE_LOW, np.uint32)
    position = words.size
    for past in range(symbols.size, 0, -1):
        # Unsigned, as every index here: a signed one costs a test for being negative.
        index = np.uint64(past - 1)
        lane = index & lane_mask
        state = np.uint32(states[lane])
        entry = (np.uint32(classes[index]) << np.uint32(8)) | np.uint32(symbols[index])
        frequency = np.uint32(flat[entry])
        # Without a branch, which would be mispredicted too often: store first, then keep or not.
        full = np.uint64(state) >= np.uint64(frequency) << np.uint64(32 - TABLE_BITS)
        words[np.uint64(position - 1)] = np.uint16(state & _WORD_MASK)
        position -= int(full)
        state = np.uint32(state >> _WORD_BITS if full else state)
        quotient = np.uint32(state // frequency)
        states[lane] = (quotient << _BITS) + (state - quotient * frequency) + starts[entry]
    position -= 2 * num_lanes
    for number in range(num_lanes):
        words[position + 2 * number] = np.uint16(states[number] & _WORD_MASK)
        words[position + 2 * number + 1] = np.uint16(states[number] >> _WORD_BITS)
    return position


_HAS_VECTORS = rans_vectors.is_supported()


class Decoder:
    """One stream on its way; ``has_vectors`` where whole groups can be decoded in vectors.

    Whatever ``words`` holds, nothing is read out of bounds, if each class has a table.
    """

    def __init__(self, words: UInt16s, classes: UInt8s, table: UInt32s, num_lanes: int) -> None:
        self._stream = words, classes, table
        self._states = np.zeros(num_lanes, np.uint32)
        self._has_states = words.size >= 2 * num_lanes
        if self._has_states:
            self._states[:] = words[: 2 * num_lanes].copy().view(np.uint32)
        self._progress = np.array([0, min(2 * num_lanes, words.size)], np.uint64)
        self.has_vectors = num_lanes == MANY_LANES and _HAS_VECTORS

    @property
    def num_decoded(self) -> int:
        return int(self._progress[0])

    def whole_elements(self, residuals: UInt8s, elements: UInt16s) -> None:
        """Decode most of the symbols, and merge them with their residuals: 16-bit floats."""
        rans_vectors.decode_elements(
            *self._stream, residuals, elements, self._states, self._progress
        )

    def rest(self, symbols: UInt8s) -> bool:
        """Fill ``symbols`` from num_decoded on; False when the words end before or after that."""
        if not self._has_states:
            return False
        if self.has_vectors:
            rans_vectors.decode_whole_groups(*self._stream, symbols, self._states, self._progress)
        return bool(_decode_rest(*self._stream, symbols, self._states, self._progress))


@kernel(
    "boolean(Array(uint16, 1, 'C', readonly=True), Array(uint8, 1, 'C', readonly=True),"
    " Array(uint32, 1, 'C', readonly=True), uint8[::1], uint32[::1], uint64[::1])"
)
def _decode_rest(
    words: UInt16s,
    classes: UInt8s,
    table: UInt32s,
    symbols: UInt8s,
    states: UInt32s,
    progress: NDArray[np.uint64],
) -> bool:
    """Decoder.rest. ``progress`` [2]: symbols decoded, in whole groups, and words read."""
    # Unsigned, as every index here: a signed one costs a test for being negative.
    position = progress[1]
    last = np.uint64(words.size - 1)
    for start in range(np.int64(progress[0]), symbols.size, states.size):
        num_lanes = min(states.size, symbols.size - start)
        # Two loops, so that the first has no carried dependency and becomes vector gathers.
        for lane in range(num_lanes):
            state = states[lane]
            index = np.uint64(start + lane)
            entry = table[(np.uint32(classes[index]) << _BITS) | (state & _SLOT_MASK)]
            frequency = ((entry >> _FREQUENCY_SHIFT) & _SLOT_MASK) + _ONE
            states[lane] = frequency * (state >> _BITS) + (entry >> _OFFSET_SHIFT)
            symbols[index] = np.uint8(entry & _SYMBOL_MASK)
        for lane in range(num_lanes):
            state = states[lane]
            refilled = (state << _WORD_BITS) | np.uint32(words[min(position, last)])
            low = state < _STATE_LOW
            states[lane] = refilled if low else state
            position += np.uint64(low)
    intact = position == words.size
    for lane in range(states.size):
        intact &= states[lane] == _STATE_LOW
    return bool(intact)
