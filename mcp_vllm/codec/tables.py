"""Static rANS tables for values quantised to integers, by how widely they spread.

Encoder and decoder each make them, so they must come out the same on any host: only additions,
multiplications, divisions and square roots of IEEE doubles, one numpy operation at a time, and no
library's exponential. A value is the byte ``integer + ZERO``; byte ESCAPE means that the value has
no byte in its class, and is elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mcp_vllm.codec import rans

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcp_vllm.codec.kernel import Float32s, UInt16s

ZERO = 128
ESCAPE = 0
LARGEST = 127
# A value that is rarer than this is left to the escape: a place in the table would cost more.
_RAREST = 0.25 / rans.TABLE_SIZE


@dataclass(frozen=True)
class Tables:
    """``frequencies`` uint16 [class, 256] for rans.py; ``limits`` int64 [class]: the largest
    magnitude that has a byte.
    """

    frequencies: UInt16s
    limits: NDArray[np.int64]


def of_tail(
    tail: Float32s, reach: float, deviations: NDArray[np.float64], rounding: float = 0.5
) -> Tables:
    """Tables of integers rounded from values of these standard deviations [class].

    ``tail`` [n]: probability that a value is further from zero than ``reach * (i / n)**2``
    deviations. ``rounding`` as for integers.encode.
    """
    edges = (np.arange(LARGEST + 2) - rounding)[None, :] / deviations[:, None]
    edges[:, 0] = 0.0
    position = np.sqrt(edges / reach) * len(tail)
    low = np.minimum(np.floor(position), len(tail) - 2.0)
    share = np.minimum(position - low, 1.0)
    index = low.astype(np.int64)
    near, far = tail.astype(np.float64)[index], tail.astype(np.float64)[index + 1]
    beyond = near + (far - near) * share
    weights = np.zeros((len(deviations), 256))
    weights[:, ZERO] = beyond[:, 0] - beyond[:, 1]
    magnitudes = (beyond[:, 1:-1] - beyond[:, 2:]) * 0.5
    limits = np.where((magnitudes >= _RAREST).any(axis=1), _last(magnitudes >= _RAREST), 0)
    magnitudes[np.arange(LARGEST)[None, :] >= limits[:, None]] = 0.0
    weights[:, ZERO + 1 :] = magnitudes
    weights[:, ZERO - 1 : ESCAPE : -1] = magnitudes
    counts = np.floor(weights * 2.0**30).astype(np.uint32)
    within = np.arange(1, LARGEST + 1)[None, :] <= limits[:, None]
    present = np.zeros(counts.shape, bool)
    present[:, [ZERO, ESCAPE]] = True
    present[:, ZERO + 1 :] = within
    present[:, ZERO - 1 : ESCAPE : -1] = within
    frequencies = np.empty(counts.shape, np.uint16)
    # A count of at least 1 keeps a place in the table for whatever is present.
    rans.normalize(np.maximum(counts, present.astype(np.uint32)), frequencies)
    return Tables(frequencies, limits.astype(np.int64))


def _last(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """1 + the index of the last true flag of each row."""
    past: NDArray[np.int64] = flags.shape[1] - np.argmax(flags[:, ::-1], axis=1)
    return past


def with_uniform(tables: Tables, num_values: int) -> Tables:
    """The same and one more class, in which bytes 0 to num_values - 1 are equally likely."""
    row = np.zeros((1, 256), np.uint16)
    row[0, :num_values] = rans.TABLE_SIZE // num_values
    return Tables(np.vstack([tables.frequencies, row]), np.append(tables.limits, 0))
