"""Between the values of a chunk and the blocks that the product of each band reads and writes.

*Blocks* are one flat float32 array, band after band, each [row, column] with rows to fill whole
tiles (multiply.py); a row is a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mcp_vllm.codec.calibration import MAX_LEVEL
from mcp_vllm.codec.kernel import Float32s, kernel
from mcp_vllm.codec.multiply import whole_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Int8s = NDArray[np.int8]
    Int64s = NDArray[np.int64]

MAX_SHIFT = 7


class Blocks:
    """Where each band's block is.

    Attributes:
        places: int64 [band, 2]: columns of all bands before it, and its own.
        num_columns: of all bands.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        own = np.array(widths, np.int64)
        self.places = np.stack([np.cumsum(own) - own, own], axis=1)
        self.num_columns = int(own.sum())

    def empty(self, num_rows: int) -> Float32s:
        """For so many tokens; rows past them are zero."""
        rows = whole_rows(num_rows)
        blocks = np.empty(rows * self.num_columns, np.float32)
        if rows > num_rows:
            for block in self.each(blocks, rows):
                block[num_rows:] = 0
        return blocks

    def each(self, blocks: Float32s, rows: int) -> list[Float32s]:
        """Views [row, column], one for each band; of whole tiles of rows."""
        return [
            blocks[rows * start : rows * (start + width)].reshape(rows, width)
            for start, width in self.places.tolist()
        ]


@kernel(
    "(Array(float32, 2, 'C', readonly=True), Array(int64, 2, 'C', readonly=True),"
    " Array(float32, 1, 'C', readonly=True), Array(float32, 3, 'C', readonly=True),"
    " Array(float32, 3, 'C', readonly=True), Array(int64, 2, 'C', readonly=True), int64,"
    " float32[::1])"
)
def take_out(
    values: Float32s,
    spans: Int64s,
    means: Float32s,
    cosines: Float32s,
    sines: Float32s,
    places: Int64s,
    num_rows: int,
    blocks: Float32s,
) -> None:
    """Values [token, channel] to blocks of ``num_rows`` rows: K turned back, means taken off.

    Args:
        spans: a head each: its first column in values, its width, its band, its first column in
            the band's block, its first mean, its turn (or -1), how many pairs are turned.
        cosines, sines: [turn, token, pair].
    """
    for span in range(spans.shape[0]):
        column, width, band, within, first_mean, turn, num_pairs = spans[span]
        start, stride = num_rows * places[band, 0] + within, places[band, 1]
        mean = means[first_mean : first_mean + width]
        for token in range(values.shape[0]):
            source = values[token, column : column + width]
            target = blocks[start + token * stride : start + token * stride + width]
            turned = 0
            if turn >= 0:
                turned = 2 * num_pairs
                first, second = source[:num_pairs], source[num_pairs:turned]
                cosine, sine = cosines[turn, token], sines[turn, token]
                for pair in range(num_pairs):
                    target[pair] = first[pair] * cosine[pair] + second[pair] * sine[pair]
                    target[pair] -= mean[pair]
                back, mean_back = target[num_pairs:turned], mean[num_pairs:turned]
                for pair in range(num_pairs):
                    back[pair] = second[pair] * cosine[pair] - first[pair] * sine[pair]
                    back[pair] -= mean_back[pair]
            for channel in range(turned, width):
                target[channel] = source[channel] - mean[channel]


@kernel(
    "(Array(float32, 1, 'C', readonly=True), Array(int64, 2, 'C', readonly=True),"
    " Array(float32, 1, 'C', readonly=True), Array(float32, 3, 'C', readonly=True),"
    " Array(float32, 3, 'C', readonly=True), Array(int64, 2, 'C', readonly=True), int64,"
    " float32[:,::1])"
)
def put_back(
    blocks: Float32s,
    spans: Int64s,
    means: Float32s,
    cosines: Float32s,
    sines: Float32s,
    places: Int64s,
    num_rows: int,
    values: Float32s,
) -> None:
    """The inverse of take_out."""
    for span in range(spans.shape[0]):
        column, width, band, within, first_mean, turn, num_pairs = spans[span]
        start, stride = num_rows * places[band, 0] + within, places[band, 1]
        mean = means[first_mean : first_mean + width]
        for token in range(values.shape[0]):
            target = values[token, column : column + width]
            source = blocks[start + token * stride : start + token * stride + width]
            turned = 0
            if turn >= 0:
                turned = 2 * num_pairs
                first, second = source[:num_pairs], source[num_pairs:turned]
                mean_second, target_second = mean[num_pairs:turned], target[num_pairs:turned]
                cosine, sine = cosines[turn, token], sines[turn, token]
                for pair in range(num_pairs):
                    x, y = first[pair] + mean[pair], second[pair] + mean_second[pair]
                    target[pair] = x * cosine[pair] - y * sine[pair]
                    target_second[pair] = y * cosine[pair] + x * sine[pair]
            for channel in range(turned, width):
                target[channel] = source[channel] + mean[channel]


@kernel("int64(float32, int64)")
def _rounded(value: float, limit: int) -> int:
    """To the nearest integer up to the limit or its negative; 0 where there is no number."""
    if not abs(value) <= limit:
        return limit if value > 0 else -limit if value < 0 else 0
    return int(np.rint(value))


@kernel(
    "(Array(float32, 1, 'C', readonly=True), Array(int64, 2, 'C', readonly=True), int64,"
    " Array(int64, 2, 'C', readonly=True), Array(float32, 1, 'C', readonly=True),"
    " Array(float32, 1, 'C', readonly=True), Array(float32, 1, 'C', readonly=True), float32,"
    " int8[:,::1], int8[:,::1], float32[:,::1])",
    fuse=True,
)
def weigh(
    blocks: Float32s,
    places: Int64s,
    num_rows: int,
    kept: Int64s,
    usual_levels: Float32s,
    finer: Float32s,
    inverse_deviations: Float32s,
    usual_magnitude: float,
    levels: Int8s,
    shifts: Int8s,
    coefficients: Float32s,
) -> None:
    """Blocks [row, the level and then coefficients] to coefficients [token, kept coefficient] in
    steps of their token, the levels of these steps, and by how many half octaves the coefficients
    spread wider than usual: both [token, band].

    Args:
        kept: [band, 2], columns of ``coefficients``, from and to.
        finer: [level], what a coefficient is multiplied by.
        inverse_deviations: [kept coefficient], per step; ``usual_magnitude`` is what the mean of
            magnitudes is usually, in deviations.
    """
    for band in range(places.shape[0]):
        first, past = kept[band]
        own_deviations = inverse_deviations[first:past]
        for token in range(coefficients.shape[0]):
            start = num_rows * places[band, 0] + token * places[band, 1]
            level = _rounded(blocks[start] + usual_levels[band], MAX_LEVEL)
            factor = finer[level + MAX_LEVEL]
            source = blocks[start + 1 : start + 1 + past - first]
            target = coefficients[token, first:past]
            total = np.float32(0)
            for index in range(past - first):
                each = source[index] * factor
                target[index] = each
                total += abs(each) * own_deviations[index]
            shift = 0
            if past > first:
                mean = total / np.float32(past - first) / usual_magnitude
                shift = _rounded(2 * np.log2(max(mean, np.float32(1e-3))), MAX_SHIFT)
            levels[token, band], shifts[token, band] = level, shift


@kernel(
    "(Array(float32, 2, 'C', readonly=True), Array(int8, 2, 'C', readonly=True),"
    " Array(float32, 1, 'C', readonly=True), Array(int64, 2, 'C', readonly=True), int64,"
    " float32[::1])"
)
def spread(
    steps: Float32s,
    levels: Int8s,
    coarser: Float32s,
    places: Int64s,
    num_rows: int,
    blocks: Float32s,
) -> None:
    """Coefficients [token, kept coefficient] in steps of their token to blocks of coefficients.

    ``coarser`` [level]: the step of tokens of that level.
    """
    for band in range(places.shape[0]):
        first, width = places[band]
        for token in range(steps.shape[0]):
            factor = coarser[np.int64(levels[token, band]) + MAX_LEVEL]
            source = steps[token, first : first + width]
            start = num_rows * first + token * width
            target = blocks[start : start + width]
            for index in range(width):
                target[index] = source[index] * factor
