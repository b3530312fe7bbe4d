"""What of a calibration applies to the chunks of one layout, at one step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mcp_vllm.codec import integers, rotation, tables
from mcp_vllm.codec.bands import Blocks
from mcp_vllm.codec.calibration import Band, Calibration
from mcp_vllm.codec.errors import CodecError
from mcp_vllm.codec.multiply import whole_columns

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcp_vllm.codec.kernel import Float32s
    from mcp_vllm.codec.planes import KVLayout, Source

    Int64s = NDArray[np.int64]

# A magnitude is rounded up from 0.58 on: what is nearer to zero costs more bits than it saves harm.
ROUNDING = 0.42
# Coefficients that deviate by less, in steps, are not kept: below 1 / sqrt(12), about, an error of
# rounding would be as large as the coefficient.
NARROWEST = 0.25
# Classes of deviations, from there on.
_CLASSES_PER_OCTAVE = 2
_NUM_CLASSES = 26
# From this class on a byte is too small, and low bits are coded apart.
_FIRST_WIDE_CLASS = 13
_MAX_PLANS = 64


@dataclass(frozen=True)
class TransformPlan:
    """What of a calibration applies to one layout and step; see bands.py for what is not said.

    Attributes:
        kept: int64 [band, 2], the first columns of the chunk's coefficients and past the last.
        turns: rotary frequencies of the layers.
        channels, products, coefficients, restored: blocks of the bands' values; of their products
            with ``analysis``; of their kept coefficients; of the products with ``synthesis``.
        inverse_deviations: float32 [kept coefficient], per step.
        usual_magnitude: mean of coefficients' magnitudes, in deviations.
    """

    bands: tuple[Band, ...]
    spans: Int64s
    kept: Int64s
    means: Float32s
    usual_levels: Float32s
    turns: tuple[Float32s, ...]
    columns: integers.Columns
    inverse_deviations: Float32s
    usual_magnitude: float

    @property
    def num_kept(self) -> int:
        return len(self.inverse_deviations)

    @cached_property
    def channels(self) -> Blocks:
        return Blocks([len(band.mean) for band in self.bands])

    @cached_property
    def products(self) -> Blocks:
        return Blocks([whole_columns(1 + past - first) for first, past in self.kept.tolist()])

    @cached_property
    def coefficients(self) -> Blocks:
        return Blocks([past - first for first, past in self.kept.tolist()])

    @cached_property
    def restored(self) -> Blocks:
        return Blocks([whole_columns(len(band.mean)) for band in self.bands])

    def angles(self, first_token: int, num_tokens: int) -> tuple[Float32s, Float32s]:
        """Cosines and sines, [turn, token, pair]."""
        num_pairs = max(map(len, self.turns), default=0)
        both = np.zeros((2, len(self.turns), num_tokens, num_pairs), np.float32)
        for turn, frequencies in enumerate(self.turns):
            both[:, turn, :, : len(frequencies)] = rotation.angles(
                frequencies, first_token, num_tokens
            )
        cosines, sines = both
        return cosines, sines


@lru_cache(maxsize=_MAX_PLANS)
def plan_of(calibration: Calibration, layout: KVLayout, step: float) -> TransformPlan:
    """CodecError when the calibration does not know the layout's heads."""
    bands = _bands_of(calibration, layout)
    bounds = np.array([NARROWEST * step * spread for spread in _spreads()])
    # Classes of falling deviations: -1 is below the first bound, and not kept.
    classes = [
        np.searchsorted(bounds, band.deviation.astype(np.float64), side="right") - 1
        for band in bands
    ]
    num_kept = [int((of_band >= 0).sum()) for of_band in classes]
    past = np.cumsum(num_kept)
    deviations = [band.deviation[:n] for band, n in zip(bands, num_kept, strict=True)]
    kept_classes = [of_band[:n] for of_band, n in zip(classes, num_kept, strict=True)]
    groups = np.repeat(np.arange(len(bands)), num_kept)
    turns = {band.frequencies.tobytes(): band.frequencies for band in bands}
    points = Calibration.TAIL_REACH * (np.arange(len(calibration.tail) + 1) / 256.0) ** 2
    return TransformPlan(
        bands,
        _spans(bands, layout.columns, list(turns)),
        np.stack([past - num_kept, past], axis=1),
        np.concatenate([band.mean for band in bands]),
        np.concatenate([band.usual_level for band in bands]),
        tuple(turns.values()),
        _columns(np.concatenate(kept_classes), groups, calibration),
        (step / np.concatenate(deviations)).astype(np.float32),
        # The mean of magnitudes is the integral of their tail.
        max(float((calibration.tail * np.diff(points)).sum()), 0.1),
    )


def _bands_of(calibration: Calibration, layout: KVLayout) -> tuple[Band, ...]:
    """The bands of the layout's heads, all of them."""
    columns = layout.columns
    bands = tuple(b for b in calibration.bands if all(source in columns for source in b.sources))
    for band in bands:
        width = len(band.mean) // len(band.sources)  # as Calibration.check knows heads
        if any(columns[each].stop - columns[each].start != width for each in band.sources):
            raise CodecError(
                f"calibration {calibration} has another head size than layer"
                f" {band.sources[0].layer} of this engine"
            )
    missing = set(columns) - {source for band in bands for source in band.sources}
    if missing:
        raise CodecError(f"calibration {calibration} lacks {min(missing)} of this engine's layers")
    return bands


def _spans(bands: tuple[Band, ...], columns: dict[Source, slice], turns: list[bytes]) -> Int64s:
    """As bands.take_out has them; a turn is one of these frequencies."""
    spans, first_mean = [], 0
    for number, band in enumerate(bands):
        turn, within = turns.index(band.frequencies.tobytes()), 0
        for source in band.sources:
            span = columns[source]
            width = span.stop - span.start
            is_turned = source.kind == "k" and len(band.frequencies)
            turned = (turn, len(band.frequencies)) if is_turned else (-1, 0)
            spans.append((span.start, width, number, within, first_mean + within, *turned))
            within += width
        first_mean += within
    return np.array(spans, np.int64)


def _columns(classes: Any, groups: Any, calibration: Calibration) -> integers.Columns:
    is_wide = classes >= _FIRST_WIDE_CLASS
    lows = np.where(is_wide, len(classes) + np.cumsum(is_wide) - 1, -1).astype(np.int64)
    of_lows = np.full(int(is_wide.sum()), _NUM_CLASSES)
    symbol_classes = np.append(classes, of_lows)
    first = np.append(np.where(is_wide, _FIRST_WIDE_CLASS, 0), of_lows)
    last = np.append(np.where(is_wide, _NUM_CLASSES, _FIRST_WIDE_CLASS) - 1, of_lows)
    # A class is coded for its middle, in the logarithm.
    deviations = NARROWEST * _spreads() * np.sqrt(np.sqrt(2.0))
    deviations[_FIRST_WIDE_CLASS:] /= integers.LOW_VALUES
    of_classes = tables.of_tail(calibration.tail, Calibration.TAIL_REACH, deviations, ROUNDING)
    with_lows = tables.with_uniform(of_classes, integers.LOW_VALUES)
    moves = integers.Moves(
        first.astype(np.uint8),
        last.astype(np.uint8),
        np.append(groups, groups[is_wide]).astype(np.int64),
    )
    return integers.Columns(symbol_classes.astype(np.uint8), lows, with_lows, moves)


def _spreads() -> Any:
    """float64 [class], lower bounds in units of the first: 1, sqrt(2), 2, ... exactly rounded."""
    octaves = np.array([float(1 << (c // _CLASSES_PER_OCTAVE)) for c in range(_NUM_CLASSES)])
    odd = np.arange(_NUM_CLASSES) % _CLASSES_PER_OCTAVE == 1
    return np.where(odd, octaves * np.sqrt(2.0), octaves)
