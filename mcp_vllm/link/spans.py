"""Copies between a host chunk, whose parts in use may be scattered, and a contiguous buffer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Spans = Sequence[tuple[int, int]]
Bytes = NDArray[np.uint8]


def check_spans(spans: Spans, row_bytes: int) -> None:
    """Raises ValueError unless the spans ascend, do not overlap and lie inside the row."""
    end = 0
    for offset, length in spans:
        if length <= 0 or offset < end:
            raise ValueError(f"span ({offset}, {length}) overlaps its predecessor or is empty")
        end = offset + length
    if not spans or end > row_bytes:
        raise ValueError(f"spans end at {end} of a row of {row_bytes} bytes")


def gather(row: Bytes, spans: Spans, out: Bytes) -> None:
    """Copy the row's spans, one after the other, to the front of `out`."""
    position = 0
    for offset, length in spans:
        out[position : position + length] = row[offset : offset + length]
        position += length


def scatter(contiguous: Bytes, spans: Spans, row: Bytes) -> None:
    """The inverse of `gather`; bytes of the row outside the spans stay as they are."""
    position = 0
    for offset, length in spans:
        row[offset : offset + length] = contiguous[position : position + length]
        position += length
