"""How often a block was seen lately: the count-min sketch of W-TinyLFU, with 4-bit counters."""

from __future__ import annotations

import numpy as np

_ROWS = 4
_MAX_COUNT = 15
_SAMPLE_PER_BLOCK = 10
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5)
_MASK = (1 << 64) - 1


class FrequencySketch:
    """Counts of blocks; all are halved when ten times the capacity were added."""

    def __init__(self, capacity: int) -> None:
        width = 1 << max(4, (capacity - 1).bit_length())
        self._shift = 64 - (width.bit_length() - 1)
        self._counts = np.zeros((_ROWS, width), np.uint8)
        self._sample = _SAMPLE_PER_BLOCK * capacity
        self._added = 0

    def add(self, block: int) -> None:
        """Count one use."""
        grew = False
        for row, cell in enumerate(self._cells(block)):
            if self._counts[row, cell] < _MAX_COUNT:
                self._counts[row, cell] += 1
                grew = True
        if grew:
            self._added += 1
            if self._added >= self._sample:
                self._counts >>= 1
                self._added //= 2

    def estimate(self, block: int) -> int:
        """Uses lately; never too few."""
        return min(int(self._counts[row, cell]) for row, cell in enumerate(self._cells(block)))

    def _cells(self, block: int) -> list[int]:
        mixed = (block + 1) * 0xFF51AFD7ED558CCD & _MASK
        mixed ^= mixed >> 33
        return [(mixed * each & _MASK) >> self._shift for each in _MULTIPLIERS]
