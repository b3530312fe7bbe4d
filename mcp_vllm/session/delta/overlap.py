"""What of a new array the old one already holds.

Between two turns of a chat an array grows along its token axis, or a sliding window drops its
oldest tokens and takes in new ones, or an answer is replaced and the tokens after a common prefix
differ. In each case the new array starts with a slab of the old one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mcp_vllm.session.delta.arrays import Bits

# Compared at once, so that a difference at the front costs no pass over everything.
_BLOCK_BYTES = 1 << 20
# Places of the old array where the new one's first token is looked at; repeated tokens are rare.
_MAX_SHIFTS = 16


@dataclass(frozen=True)
class Overlap:
    """Along ``axis``, new[:length] equals old[start : start + length]; all other axes agree."""

    axis: int = 0
    start: int = 0
    length: int = 0


def longest_overlap(old: Bits, new: Bits) -> Overlap:
    """The overlap that leaves least of ``new``; of length 0 if there is none."""
    best, best_share = Overlap(), 0.0
    for axis in _axes_to_try(old.shape, new.shape):
        start, length = _overlap_along(np.moveaxis(old, axis, 0), np.moveaxis(new, axis, 0))
        share = length / new.shape[axis]
        if share > best_share:
            best, best_share = Overlap(axis, start, length), share
    return best


def _axes_to_try(old: tuple[int, ...], new: tuple[int, ...]) -> list[int]:
    """Axes along which one could be a slab of the other; none for arrays without elements."""
    if len(old) != len(new) or 0 in old or 0 in new:
        return []
    return [
        axis
        for axis in range(len(new))
        if old[:axis] == new[:axis] and old[axis + 1 :] == new[axis + 1 :]
    ]


def _overlap_along(old: Bits, new: Bits) -> tuple[int, int]:
    """Start and length of the overlap of [row, ...] arrays."""
    best = 0, _common_rows(old, new)
    if best[1] == min(len(old), len(new)):
        return best
    for start in _rows_like(new[0], old):
        length = _common_rows(old[start:], new)
        if length > best[1]:
            best = start, length
    return best


def _rows_in_block(rows: Bits) -> int:
    return max(1, _BLOCK_BYTES // rows[:1].nbytes)


def _common_rows(old: Bits, new: Bits) -> int:
    """How many rows at the front are equal."""
    common, step = min(len(old), len(new)), _rows_in_block(new)
    for start in range(0, common, step):
        stop = min(start + step, common)
        same = (old[start:stop] == new[start:stop]).reshape(stop - start, -1).all(axis=1)
        if not same.all():
            return start + int(same.argmin())
    return common


def _rows_like(row: Bits, old: Bits) -> list[int]:
    """Where in ``old`` the row occurs, the first few places after the front."""
    found: list[int] = []
    step = _rows_in_block(old)
    for start in range(0, len(old), step):
        block = old[start : start + step]
        same = (block == row).reshape(len(block), -1).all(axis=1)
        found += [start + int(index) for index in np.flatnonzero(same) if start + index > 0]
        if len(found) >= _MAX_SHIFTS:
            break
    return found[:_MAX_SHIFTS]
