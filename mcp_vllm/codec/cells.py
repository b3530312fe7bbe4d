"""Which bytes of an exponent plane have the same statistics: cells, found without being told.

All values of one channel over neighbouring tokens have about the same magnitude; such a group is a
*cell*. Where a channel's values lie depends on the page layout, so the plane is cut into *units* of
UNIT_ROWS x channels symbols, and each unit gets the *grid* that fits it best:

    cell of symbol j of a unit = (j // (rows * period)) * period + j % period

with rows in 16, 32, 64, 128 (how many values share a cell) and period in

    channels  row-major pages [token, channel]: GPU backends, and V on CPUs
    1         transposed pages [channel, token]: K on CPUs
    2         two channels interleaved per token: K packed for matrix tiles
    32        sixteen channels of token pairs: V packed for matrix tiles

A grid is one byte: index of the period * 4 + log2(rows / 16). The cells of a unit are numbered on
from those of the unit before it.
"""

import numpy as np

from mcp_vllm.codec.kernel import Float32s, UInt8s, UInt32s, kernel

UNIT_ROWS = 128
MIN_ROWS = 16
NUM_GRIDS = 16
DEFAULT_CHANNELS = 256

# Bits that one more cell costs, about: the entropy of its class.
_CELL_COST_BITS = 2.5


def unit_channels(channels: int, num_symbols: int) -> int:
    """The channels to cut units by: as given, unless unknown or too many for one cell each."""
    return channels if 1 < channels <= num_symbols // MIN_ROWS else DEFAULT_CHANNELS


def num_units(num_symbols: int, channels: int) -> int:
    return -(-num_symbols // (UNIT_ROWS * channels))


@kernel("int64(int64, int64)")
def _period(grid: int, channels: int) -> int:
    index = grid >> 2
    if index == 0:
        return channels
    return 1 if index == 1 else 2 if index == 2 else 32


@kernel("int64(int64, int64, int64)")
def _num_cells_of_unit(grid: int, channels: int, size: int) -> int:
    period = _period(grid, channels)
    span = (MIN_ROWS << (grid & 3)) * period
    return (size + span - 1) // span * period


@kernel("int64(Array(uint8, 1, 'C', readonly=True), int64, int64)")
def num_cells(grids: UInt8s, channels: int, num_symbols: int) -> int:
    """How many cells the units of ``num_symbols`` symbols have."""
    unit_size = UNIT_ROWS * channels
    total = 0
    for unit in range(grids.size):
        size = min(unit_size, num_symbols - unit * unit_size)
        total += _num_cells_of_unit(int(grids[unit]), channels, size)
    return total


@kernel("(Array(uint8, 1, 'C', readonly=True), uint8[::1])")
def pack_classes(classes: UInt8s, packed: UInt8s) -> None:
    """Classes, which are below 16, two a byte: those of the first half low, of the second high.
    ``packed`` [half, rounded up].
    """
    packed[:] = classes[: packed.size]
    second = classes[packed.size :]
    for index in range(second.size):
        packed[index] |= second[index] << np.uint8(4)


@kernel("(Array(uint8, 1, 'C', readonly=True), uint8[::1])")
def unpack_classes(packed: UInt8s, classes: UInt8s) -> None:
    """The inverse of pack_classes."""
    first, second = classes[: packed.size], classes[packed.size :]
    for index in range(first.size):
        first[index] = packed[index] & np.uint8(15)
    for index in range(second.size):
        second[index] = packed[index] >> np.uint8(4)


@kernel("boolean(Array(uint8, 1, 'C', readonly=True), int64)")
def all_below(values: UInt8s, bound: int) -> bool:
    """Whether all are; numpy's own maximum takes several times as long for so few."""
    num_others = 0
    for index in range(values.size):
        num_others += int(values[index] >= bound)
    return num_others == 0


@kernel("(Array(uint8, 1, 'C', readonly=True), int64, uint8[::1])")
def _larger_of_two(symbols: UInt8s, distance: int, target: UInt8s) -> None:
    """target[i] = the larger of symbols[i] and symbols[i + distance]."""
    # Views, not computed indices: those might be negative, and would not become vector loads.
    near = symbols[: target.size]
    far = symbols[distance : distance + target.size]
    for index in range(target.size):
        target[index] = far[index] if far[index] > near[index] else near[index]


@kernel("int64(Array(uint8, 1, 'C', readonly=True), int64, uint8[:,::1])")
def _sum_of_maxima(symbols: UInt8s, period: int, scratch: UInt8s) -> int:
    """Sum over cells of MIN_ROWS rows of their largest symbol; ``symbols`` holds whole cells.

    The tighter the cells, the smaller. ``scratch`` [2, at least as many as symbols].
    """
    # Four passes over everything, each a vector loop whatever the period, halve the rows of a cell.
    size = symbols.size
    _larger_of_two(symbols, 8 * period, scratch[0, : size - 8 * period])
    _larger_of_two(scratch[0], 4 * period, scratch[1, : size - 12 * period])
    _larger_of_two(scratch[1], 2 * period, scratch[0, : size - 14 * period])
    _larger_of_two(scratch[0], period, scratch[1, : size - 15 * period])
    total = 0
    for start in range(0, size, MIN_ROWS * period):
        largest = scratch[1, start : start + period]
        for column in range(period):
            total += largest[column]
    return total


@kernel("(Array(uint8, 1, 'C', readonly=True), int64, int64, uint8[::1], uint32[::1], uint32[::1])")
def _summarize_cell(
    symbols: UInt8s, cell: int, depth: int, maxima: UInt8s, sums: UInt32s, squares: UInt32s
) -> None:
    """_summarize of one cell, all of whose symbols are ``symbols``."""
    largest = np.uint8(0)
    for index in range(symbols.size):
        largest = max(largest, symbols[index])
    floor = np.int32(largest) - np.int32(depth)
    total = np.int32(0)
    total_squares = np.int32(0)
    for index in range(symbols.size):
        height = max(np.int32(symbols[index]) - floor, np.int32(0))
        total += height
        total_squares += height * height
    maxima[cell] = largest
    sums[cell] = total
    squares[cell] = total_squares


@kernel("(Array(uint8, 1, 'C', readonly=True), int64, uint8[::1], uint32[::1], uint32[::1])")
def _summarize_columns(
    symbols: UInt8s, depth: int, maxima: UInt8s, sums: UInt32s, squares: UInt32s
) -> None:
    """_summarize of as many cells as ``maxima`` has, one symbol of each in turn."""
    period = maxima.size
    maxima[:] = 0
    sums[:] = 0
    squares[:] = 0
    # One output per loop: with more, the compiler gives up on proving that they do not overlap.
    for start in range(0, symbols.size, period):
        row = symbols[start : start + period]
        for column in range(row.size):
            symbol = row[column]
            largest = maxima[column]
            maxima[column] = symbol if symbol > largest else largest
    for start in range(0, symbols.size, period):
        row = symbols[start : start + period]
        for column in range(row.size):
            height = np.int32(row[column]) - np.int32(maxima[column]) + np.int32(depth)
            sums[column] += np.uint32(max(height, np.int32(0)))
    for start in range(0, symbols.size, period):
        row = symbols[start : start + period]
        for column in range(row.size):
            height = np.int32(row[column]) - np.int32(maxima[column]) + np.int32(depth)
            squares[column] += np.uint32(max(height, np.int32(0)) ** 2)


@kernel(
    "(Array(uint8, 1, 'C', readonly=True), int64, int64, int64, uint8[::1], uint32[::1],"
    " uint32[::1])"
)
def _summarize(
    symbols: UInt8s,
    period: int,
    rows: int,
    depth: int,
    maxima: UInt8s,
    sums: UInt32s,
    squares: UInt32s,
) -> None:
    """Per cell of ``rows`` rows: the largest symbol, and over the symbols' heights the sum and the
    sum of squares, where height = max(symbol - largest + depth, 0).

    Heights, since a few symbols far below the rest (a zero among floats) would spoil a plain mean.
    """
    span = rows * period
    for block in range((symbols.size + span - 1) // span):
        in_block = symbols[block * span : (block + 1) * span]
        if period <= 2:
            for column in range(period):
                cell = block * period + column
                in_cell = in_block if period == 1 else in_block[column::2].copy()
                _summarize_cell(in_cell, cell, depth, maxima, sums, squares)
        else:
            past = (block + 1) * period
            _summarize_columns(
                in_block, depth, maxima[past - period : past], sums[past - period : past],
                squares[past - period : past],
            )  # fmt: skip


@kernel("int64(uint8[::1], uint32[::1], uint32[::1], int64, int64)")
def _cheapest_rows(maxima: UInt8s, sums: UInt32s, squares: UInt32s, period: int, depth: int) -> int:
    """log2(rows / MIN_ROWS) with the least estimated bits for symbols and for classes of cells.

    Given the summary of cells of MIN_ROWS. Heights are taken as normal around the mean of their
    cell, with one variance for all cells.
    """
    num_symbols = maxima.size * MIN_ROWS
    totals = np.empty(maxima.size, np.float64)
    sum_of_squares = 0.0
    for cell in range(maxima.size):
        floor = np.float64(maxima[cell]) - np.float64(depth)
        totals[cell] = sums[cell] + MIN_ROWS * floor
        sum_of_squares += squares[cell] + floor * (2.0 * sums[cell] + MIN_ROWS * floor)
    num_blocks = maxima.size // period
    rows_of_last = MIN_ROWS
    cheapest = 0
    least_bits = np.inf
    for rows_log2 in range(4):
        last = (num_blocks - 1) * period
        explained = np.sum(totals[:last] ** 2) / (MIN_ROWS << rows_log2)
        explained += np.sum(totals[last : last + period] ** 2) / rows_of_last
        num_cells = num_blocks * period
        variance = (sum_of_squares - explained) / (num_symbols - num_cells)
        bits = 0.5 * num_symbols * np.log2(variance + 1.0 / 12.0) + _CELL_COST_BITS * num_cells
        if bits < least_bits:
            least_bits = bits
            cheapest = rows_log2
        # Pairs of blocks become one; an odd one stays as it is.
        for block in range(num_blocks // 2):
            for column in range(period):
                first = 2 * block * period + column
                totals[block * period + column] = totals[first] + totals[first + period]
        if num_blocks % 2:
            totals[last // 2 : last // 2 + period] = totals[last : last + period]
        else:
            rows_of_last += MIN_ROWS << rows_log2
        num_blocks = (num_blocks + 1) // 2
    return cheapest


@kernel("(Array(uint8, 1, 'C', readonly=True), int64, int64, uint8[::1])")
def choose_grids(symbols: UInt8s, channels: int, depth: int, grids: UInt8s) -> None:
    """Fill in the grid of each unit: the period with the tightest cells, then the rows."""
    unit_size = UNIT_ROWS * channels
    largest_unit = min(unit_size, symbols.size)
    scratch = np.empty((2, largest_unit), np.uint8)
    maxima = np.empty(largest_unit // MIN_ROWS, np.uint8)
    sums = np.empty(maxima.size, np.uint32)
    squares = np.empty(maxima.size, np.uint32)
    for unit in range(grids.size):
        in_unit = symbols[unit * unit_size : (unit + 1) * unit_size]
        grids[unit] = 7  # Transposed, 128 rows: the fewest cells, for a unit too small to measure.
        tightest = np.inf
        for index in range(4):
            period = _period(index << 2, channels)
            whole = in_unit.size // (MIN_ROWS * period) * (MIN_ROWS * period)
            if 2 * whole > in_unit.size:
                mean = _sum_of_maxima(in_unit[:whole], period, scratch) / whole
                if mean < tightest:
                    tightest = mean
                    grids[unit] = index << 2
        if tightest < np.inf:
            period = _period(int(grids[unit]), channels)
            num_cells = in_unit.size // (MIN_ROWS * period) * period
            summary = maxima[:num_cells], sums[:num_cells], squares[:num_cells]
            _summarize(in_unit[: num_cells * MIN_ROWS], period, MIN_ROWS, depth, *summary)
            grids[unit] += _cheapest_rows(*summary, period, depth)


@kernel(
    "(Array(uint8, 1, 'C', readonly=True), Array(uint8, 1, 'C', readonly=True), int64, int64,"
    " float32[::1])"
)
def measure_cells(
    symbols: UInt8s, grids: UInt8s, channels: int, depth: int, means: Float32s
) -> None:
    """Trimmed mean of the symbols of each cell; NaN for a cell past the end of the plane."""
    unit_size = UNIT_ROWS * channels
    maxima = np.empty(means.size, np.uint8)
    sums = np.empty(means.size, np.uint32)
    squares = np.empty(means.size, np.uint32)
    first = 0
    for unit in range(grids.size):
        grid = int(grids[unit])
        in_unit = symbols[unit * unit_size : (unit + 1) * unit_size]
        period = _period(grid, channels)
        rows = MIN_ROWS << (grid & 3)
        past = first + _num_cells_of_unit(grid, channels, in_unit.size)
        _summarize(
            in_unit, period, rows, depth, maxima[first:past], sums[first:past], squares[first:past]
        )
        for cell in range(past - first):
            start = cell // period * rows * period
            size = min(rows * period, in_unit.size - start)
            count = (size - cell % period + period - 1) // period
            mean = maxima[first + cell] - depth + np.float32(sums[first + cell]) / np.float32(count)
            means[first + cell] = mean if count > 0 else np.nan
        first = past


@kernel("int64(Array(float32, 1, 'C', readonly=True), float64, int64, uint8[::1])")
def classify(means: Float32s, least_step: float, most_classes: int, classes: UInt8s) -> int:
    """Class of each cell by equal steps of its mean; returns how many classes there are.

    The steps divide the range without the 1 % of cells at each end. Classes are numbered in order,
    none is empty; a cell without symbols (a mean of NaN) joins the lowest.
    """
    bins_per_symbol = 4
    last_bin = 256 * bins_per_symbol - 1
    counts = np.zeros(last_bin + 1, np.int64)
    for cell in range(means.size):
        if not np.isnan(means[cell]):
            counts[min(max(int(means[cell] * bins_per_symbol), 0), last_bin)] += 1
    most_outliers = counts.sum() // 100
    low = 0
    below = counts[0]
    while below <= most_outliers and low < last_bin:
        low += 1
        below += counts[low]
    high = last_bin
    above = counts[high]
    while above <= most_outliers and high > low:
        high -= 1
        above += counts[high]
    origin = low / bins_per_symbol
    step = max(least_step, (high + 1 - low) / bins_per_symbol / most_classes)
    number_of_step = np.zeros(most_classes, np.uint8)
    for cell in range(means.size):
        if not np.isnan(means[cell]):
            classes[cell] = min(max(int((means[cell] - origin) / step), 0), most_classes - 1)
            number_of_step[classes[cell]] = 1
    num_classes = 0
    for number in range(most_classes):
        is_used = number_of_step[number]
        number_of_step[number] = num_classes
        num_classes += is_used
    for cell in range(means.size):
        classes[cell] = 0 if np.isnan(means[cell]) else number_of_step[classes[cell]]
    return num_classes


@kernel(
    "(Array(uint8, 1, 'C', readonly=True), Array(uint8, 1, 'C', readonly=True), int64, uint8[::1])"
)
def spread_classes(cell_classes: UInt8s, grids: UInt8s, channels: int, classes: UInt8s) -> None:
    """Write the class of each symbol's cell to ``classes`` [symbol]."""
    unit_size = UNIT_ROWS * channels
    first_cell = 0
    for unit in range(grids.size):
        grid = int(grids[unit])
        in_unit = classes[unit * unit_size : (unit + 1) * unit_size]
        period = _period(grid, channels)
        rows = MIN_ROWS << (grid & 3)
        for block in range(0, in_unit.size, rows * period):
            in_block = in_unit[block : block + rows * period]
            if period == 1:
                in_block[:] = cell_classes[first_cell]
            else:
                of_columns = cell_classes[first_cell : first_cell + period]
                for start in range(0, in_block.size, period):
                    row = in_block[start : start + period]
                    for column in range(row.size):
                        row[column] = of_columns[column]
            first_cell += period


@kernel("(Array(uint8, 1, 'C', readonly=True), Array(uint8, 1, 'C', readonly=True), uint32[:,::1])")
def count_symbols(symbols: UInt8s, classes: UInt8s, counts: UInt32s) -> None:
    """Histogram [class, 256] of the symbols of each class."""
    counts[:] = 0
    for index in range(symbols.size):
        counts[classes[index], symbols[index]] += np.uint32(1)
