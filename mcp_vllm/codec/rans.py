"""Entropy coding of bytes by static tables, one per class of bytes: range ANS, 16 lanes.

After J. Duda, "Asymmetric numeral systems" (arXiv:1311.2540), in the interleaved form of F. Giesen
(arXiv:1402.3392): 32-bit states renormalised by 16-bit words. Symbol i belongs to lane i mod 16;
the encoder walks backwards, so the decoder reads
forwards: the uint32 state of each lane, then the uint16 words. Hosts are little-endian.

Invariant: a state is at least 2**16 between symbols, and back at 2**16 when all are decoded.
"""

import numpy as np

from mcp_vllm.codec.kernel import UInt8s, UInt16s, UInt32s, kernel

NUM_LANES = 16
TABLE_BITS = 11
TABLE_SIZE = 1 << TABLE_BITS
STATES_SIZE_BYTES = 4 * NUM_LANES

_LANES = np.uint64(NUM_LANES)
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


@kernel("(Array(uint16, 2, 'C', readonly=True), uint32[::1])")
def build_decoding_table(frequencies: UInt16s, table: UInt32s) -> None:
    """Fill table [class * TABLE_SIZE + slot] from frequencies that sum to TABLE_SIZE per class."""
    slot = 0
    for row in range(frequencies.shape[0]):
        for symbol in range(256):
            frequency = np.uint32(frequencies[row, symbol])
            entry = np.uint32(symbol) | ((frequency - _ONE) << _FREQUENCY_SHIFT)
            for offset in range(frequency):
                table[slot] = entry | (np.uint32(offset) << _OFFSET_SHIFT)
                slot += 1


def most_words(num_symbols: int) -> int:
    """How large a buffer ``encode`` needs, in words."""
    return num_symbols + STATES_SIZE_BYTES // 2


@kernel(
    "int64(Array(uint8, 1, 'C', readonly=True), Array(uint8, 1, 'C', readonly=True),"
    " Array(uint16, 2, 'C', readonly=True), uint16[::1])"
)
def encode(symbols: UInt8s, classes: UInt8s, frequencies: UInt16s, words: UInt16s) -> int:
    """Write states and words to the end of ``words`` [most_words]; return where they start.

    Every symbol must have a frequency in the table of its class.
    """
    flat = frequencies.ravel()
    starts = np.empty(flat.size, np.uint32)
    for row in range(0, flat.size, 256):
        start = np.uint32(0)
        for symbol in range(256):
            starts[row + symbol] = start
            start += np.uint32(flat[row + symbol])
    states = np.full(NUM_LANES, _STATE_LOW, np.uint32)
    position = words.size
    for past in range(symbols.size, 0, -1):
        # Unsigned, as every index here: a signed one costs a test for being negative.
        index = np.uint64(past - 1)
        lane = index % _LANES
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
    position -= 2 * NUM_LANES
    for number in range(NUM_LANES):
        words[position + 2 * number] = np.uint16(states[number] & _WORD_MASK)
        words[position + 2 * number + 1] = np.uint16(states[number] >> _WORD_BITS)
    return position


@kernel(
    "boolean(Array(uint16, 1, 'C', readonly=True), Array(uint8, 1, 'C', readonly=True),"
    " Array(uint32, 1, 'C', readonly=True), uint8[::1])"
)
def decode(words: UInt16s, classes: UInt8s, table: UInt32s, symbols: UInt8s) -> bool:
    """Fill ``symbols``; False when the words are not a stream of exactly that length.

    ``words`` holds the states at least. Whatever it holds, nothing is read out of bounds, if each
    class has a table.
    """
    states = np.empty(NUM_LANES, np.uint32)
    for lane in range(NUM_LANES):
        high = np.uint32(words[2 * lane + 1]) << _WORD_BITS
        states[lane] = high | np.uint32(words[2 * lane])
    # Unsigned, as every index here: a signed one costs a test for being negative.
    position = np.uint64(2 * NUM_LANES)
    last = np.uint64(words.size - 1)
    for start in range(0, symbols.size, NUM_LANES):
        num_lanes = min(NUM_LANES, symbols.size - start)
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
    for lane in range(NUM_LANES):
        intact &= states[lane] == _STATE_LOW
    return bool(intact)
