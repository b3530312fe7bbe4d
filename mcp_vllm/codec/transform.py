"""The lossy tiers `balanced` and `small`: values decorrelated, quantised, entropy-coded.

Head (lossy.py): the calibration's fingerprint (uint8[16]) and the step (float32). Parts: two planes
of bytes [band, token], zstandard; the rANS stream of the coefficients (integers.py); its escapes.

Which coefficients are kept, and their tables, follow from the calibration and the step alone. The
first byte moves a token's coefficients to the tables of values that spread more or less, by half
octaves; the second is by how many the token's step is coarser, or finer: what matters more, by its
own values, is kept better (fit.py).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mcp_vllm.codec import integers, rotation, tables
from mcp_vllm.codec.byte_planes import compressor, decompress_exactly
from mcp_vllm.codec.calibration import FINGERPRINT_SIZE, MAX_LEVEL, Band, Calibration
from mcp_vllm.codec.errors import CodecError, FrameError
from mcp_vllm.codec.loss import NUM_EXACT_TOKENS
from mcp_vllm.codec.lossy import LossyCodec
from mcp_vllm.codec.multiply import product

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from mcp_vllm.codec.kernel import Float32s
    from mcp_vllm.codec.planes import KVLayout

_HEAD = struct.Struct(f"<{FINGERPRINT_SIZE}sf")
_MAX_STEP = 1e6
_MIN_STEP = 1e-6
# Coefficients that deviate by less, in steps, are not kept: below 1 / sqrt(12), about, an error of
# rounding would be as large as the coefficient.
_NARROWEST = 0.25
# Classes of deviations, from there on.
_CLASSES_PER_OCTAVE = 2
_NUM_CLASSES = 26
# From this class on a byte is too small, and low bits are coded apart.
_FIRST_WIDE_CLASS = 13
_MAX_PLANS = 64
# A magnitude is rounded up from 0.58 on: what is nearer to zero costs more bits than it saves harm.
_ROUNDING = 0.42
_MAX_SHIFT = 7
_ZSTD_LEVEL = 1
# Of levels -MAX_LEVEL to MAX_LEVEL: how much coarser a token's step is.
_COARSER = (2.0 ** (np.arange(-MAX_LEVEL, MAX_LEVEL + 1) / 2.0)).astype(np.float32)


def to_coefficients(values: Any, band: Band, num_kept: int) -> Any:
    """[token, channel] to the first coefficients, [token, coefficient]; of arrays or tensors."""
    if isinstance(values, np.ndarray):
        return product(values, band.analysis, num_kept, band.mean)
    mean, analysis = (values.new_tensor(array) for array in (band.mean, band.analysis))
    return (values - mean) @ analysis[:, :num_kept]


def to_values(coefficients: Any, band: Band) -> Any:
    """The inverse of to_coefficients, as far as coefficients were kept."""
    num_kept = coefficients.shape[1]
    if isinstance(coefficients, np.ndarray):
        values = product(coefficients, band.synthesis[:num_kept], len(band.mean))
        values += band.mean
        return values
    mean, synthesis = (coefficients.new_tensor(array) for array in (band.mean, band.synthesis))
    return coefficients @ synthesis[:num_kept] + mean


@dataclass(frozen=True)
class _BandPlan:
    """A band and what of it applies to one layout and step.

    Attributes:
        spans: columns of the chunk's values that hold the band's channels, in their order.
        keys: of these, the heads of K to turn back by the band's rotary frequencies.
        kept: columns of the chunk's coefficients that hold the band's first ones.
    """

    band: Band
    spans: tuple[slice, ...]
    keys: tuple[slice, ...]
    kept: slice

    @property
    def num_kept(self) -> int:
        num_kept: int = self.kept.stop - self.kept.start
        return num_kept


@dataclass(frozen=True)
class _Plan:
    """
    Attributes:
        inverse_deviations: float32 [kept coefficient], per step.
        usual_magnitude: mean of coefficients' magnitudes, in deviations.
    """

    bands: tuple[_BandPlan, ...]
    columns: integers.Columns
    inverse_deviations: Float32s
    usual_magnitude: float


@lru_cache(maxsize=_MAX_PLANS)
def _plan(calibration: Calibration, layout: KVLayout, step: float) -> _Plan:
    """CodecError when the calibration does not know the layout's heads."""
    columns = layout.columns
    bounds = np.array([_NARROWEST * step * spread for spread in _spreads()])
    plans, classes, deviations, num_kept = [], [], [], 0
    for band in calibration.bands:
        if not all(source in columns for source in band.sources):
            continue
        spans = tuple(columns[source] for source in band.sources)
        if sum(span.stop - span.start for span in spans) != len(band.mean):
            raise CodecError(
                f"calibration {calibration} has another head size than layer"
                f" {band.sources[0].layer} of this engine"
            )
        keys = tuple(columns[s] for s in band.sources if s.kind == "k" and len(band.frequencies))
        # Classes of falling deviations: -1 is below the first bound, and not kept.
        of_band = np.searchsorted(bounds, band.deviation.astype(np.float64), side="right") - 1
        past = num_kept + int((of_band >= 0).sum())
        plans.append(_BandPlan(band, spans, keys, slice(num_kept, past)))
        classes.append(of_band[: past - num_kept])
        deviations.append(band.deviation[: past - num_kept])
        num_kept = past
    missing = set(columns) - {source for plan in plans for source in plan.band.sources}
    if missing:
        raise CodecError(f"calibration {calibration} lacks {min(missing)} of this engine's layers")
    groups = np.repeat(np.arange(len(plans)), [plan.num_kept for plan in plans])
    points = Calibration.TAIL_REACH * (np.arange(len(calibration.tail) + 1) / 256.0) ** 2
    return _Plan(
        tuple(plans),
        _columns(np.concatenate(classes), groups, calibration),
        (step / np.concatenate(deviations)).astype(np.float32),
        # The mean of magnitudes is the integral of their tail.
        max(float((calibration.tail * np.diff(points)).sum()), 0.1),
    )


def _columns(classes: Any, groups: Any, calibration: Calibration) -> integers.Columns:
    is_wide = classes >= _FIRST_WIDE_CLASS
    lows = np.where(is_wide, len(classes) + np.cumsum(is_wide) - 1, -1).astype(np.int64)
    of_lows = np.full(int(is_wide.sum()), _NUM_CLASSES)
    symbol_classes = np.append(classes, of_lows)
    first = np.append(np.where(is_wide, _FIRST_WIDE_CLASS, 0), of_lows)
    last = np.append(np.where(is_wide, _NUM_CLASSES, _FIRST_WIDE_CLASS) - 1, of_lows)
    # A class is coded for its middle, in the logarithm.
    deviations = _NARROWEST * _spreads() * np.sqrt(np.sqrt(2.0))
    deviations[_FIRST_WIDE_CLASS:] /= integers.LOW_VALUES
    of_classes = tables.of_tail(calibration.tail, Calibration.TAIL_REACH, deviations, _ROUNDING)
    with_lows = tables.with_uniform(of_classes, integers.LOW_VALUES)
    moves = integers.Moves(
        first.astype(np.uint8),
        last.astype(np.uint8),
        np.append(groups, groups[is_wide]).astype(np.int64),
    )
    return integers.Columns(symbol_classes.astype(np.uint8), lows, with_lows, moves)


def _shifts(coefficients: Float32s, plan: _Plan) -> Any:
    """int8 [token, band]: how many half octaves wider than usual a token's coefficients spread."""
    means = np.ones((len(coefficients), len(plan.bands)), np.float32)
    with np.errstate(over="ignore"):
        spread = np.abs(coefficients) * plan.inverse_deviations
        for index, each in enumerate(plan.bands):
            if each.num_kept:
                means[:, index] = spread[:, each.kept].mean(axis=1) / plan.usual_magnitude
    # NaN where a value is not finite, which is found when it is rounded.
    octaves = np.log2(np.clip(np.nan_to_num(means), 1e-3, 1e3))
    return np.clip(np.rint(2 * octaves), -_MAX_SHIFT, _MAX_SHIFT).astype(np.int8)


def _spreads() -> Any:
    """float64 [class], lower bounds in units of the first: 1, sqrt(2), 2, ... exactly rounded."""
    octaves = np.array([float(1 << (c // _CLASSES_PER_OCTAVE)) for c in range(_NUM_CLASSES)])
    odd = np.arange(_NUM_CLASSES) % _CLASSES_PER_OCTAVE == 1
    return np.where(odd, octaves * np.sqrt(2.0), octaves)


class TransformCodec(LossyCodec):
    """See the module's docstring. Subclasses are tiers: a name, an id, a step for their promise.

    Attributes:
        step: quantisation step, in the calibration's unit of harm; larger is smaller and worse.
    """

    NUM_PARTS = 3
    default_step: ClassVar[float]

    def __init__(
        self,
        calibration: Calibration,
        step: float | None = None,
        num_exact_tokens: int = NUM_EXACT_TOKENS,
    ) -> None:
        super().__init__(num_exact_tokens)
        # As the frame carries it.
        self.step = float(np.float32(self.default_step if step is None else step))
        if not _MIN_STEP <= self.step <= _MAX_STEP:
            raise CodecError(f"step {step} is outside {_MIN_STEP}..{_MAX_STEP}")
        self.calibration = calibration

    def encode_values(
        self, values: Float32s, kv: KVLayout, first_token: int
    ) -> tuple[bytes, Sequence[Buffer]] | None:
        plan = _plan(self.calibration, kv, self.step)
        coefficients, levels = _coefficients(values, plan, first_token, self.step)
        shifts = _shifts(coefficients, plan)
        coded = integers.encode(coefficients, plan.columns, shifts, _ROUNDING)
        if coded is None:
            return None
        head = _HEAD.pack(self.calibration.fingerprint, self.step)
        return head, [_packed(shifts, levels), *coded]

    def decode_values(
        self, head: memoryview, parts: list[memoryview], kv: KVLayout, tokens: range
    ) -> Float32s:
        if len(head) != _HEAD.size:
            raise FrameError(f"a {self.name} frame lacks the end of its head")
        fingerprint, step = _HEAD.unpack(head)
        if fingerprint != self.calibration.fingerprint:
            raise CodecError(
                f"frame was coded with calibration {fingerprint.hex()}, here is {self.calibration};"
                " give both engines the same file"
            )
        if not _MIN_STEP <= step <= _MAX_STEP:
            raise FrameError(f"a {self.name} frame claims a step of {step}")
        plan = _plan(self.calibration, kv, step)
        shifts, levels = _unpacked(parts[0], len(plan.bands), len(tokens))
        steps = integers.decode(parts[1], parts[2], len(tokens), plan.columns, shifts)
        return _values(steps, levels, plan, tokens.start, step, kv.num_channels)


def _packed(shifts: Any, levels: Any) -> bytes:
    """Both int8 [token, band], moved to where they are not negative, band by band."""
    planes = np.stack([(shifts + _MAX_SHIFT).T, (levels + MAX_LEVEL).T]).astype(np.uint8)
    return compressor(_ZSTD_LEVEL).compress(planes.tobytes())


def _unpacked(part: memoryview, num_bands: int, num_tokens: int) -> tuple[Any, Any]:
    """The inverse of _packed, of an untrusted part."""
    unpacked = np.frombuffer(decompress_exactly(part, 2 * num_bands * num_tokens), np.uint8)
    moved = unpacked.reshape(2, num_bands, num_tokens)
    if moved[0].max(initial=0) > 2 * _MAX_SHIFT or moved[1].max(initial=0) > 2 * MAX_LEVEL:
        raise FrameError("a lossy part moves coefficients past the tables")
    shifts, levels = moved.astype(np.int8)
    shifts -= np.int8(_MAX_SHIFT)
    levels -= np.int8(MAX_LEVEL)
    return np.ascontiguousarray(shifts.T), np.ascontiguousarray(levels.T)


def _coefficients(
    values: Float32s, plan: _Plan, first_token: int, step: float
) -> tuple[Float32s, Any]:
    """In steps of their token, not yet rounded: float32 [token, kept coefficient]; and the levels
    of these steps, int8 [token, band]. Changes ``values``.
    """
    num_kept = plan.bands[-1].kept.stop
    coefficients = np.empty((len(values), num_kept), np.float32)
    levels = np.empty((len(values), len(plan.bands)), np.int8)
    with np.errstate(all="ignore"):  # What is not finite is found when it is rounded.
        _turn_keys(values, plan, first_token, backwards=True)
        for index, each in enumerate(plan.bands):
            of_band = _concatenated(values, each.spans)
            levels[:, index] = _levels(of_band, each.band)
            finer = np.float32(1.0 / step) / _COARSER[levels[:, index] + MAX_LEVEL]
            of_band = to_coefficients(of_band, each.band, each.num_kept)
            np.multiply(of_band, finer[:, None], out=coefficients[:, each.kept])
    return coefficients, levels


def _levels(values: Float32s, band: Band) -> Any:
    """int8 [token]"""
    exact = (values - band.mean) @ band.level_weights + band.usual_level
    return np.clip(np.rint(np.nan_to_num(exact)), -MAX_LEVEL, MAX_LEVEL).astype(np.int8)


def _concatenated(values: Float32s, spans: tuple[slice, ...]) -> Float32s:
    if all(left.stop == right.start for left, right in pairwise(spans)):
        return values[:, spans[0].start : spans[-1].stop]
    return np.concatenate([values[:, span] for span in spans], axis=1)


def _values(
    steps: Float32s, levels: Any, plan: _Plan, first_token: int, step: float, num_channels: int
) -> Float32s:
    """The inverse of _coefficients; always finite."""
    values = np.empty((len(steps), num_channels), np.float32)
    for index, each in enumerate(plan.bands):
        of_token = np.float32(step) * _COARSER[levels[:, index] + MAX_LEVEL]
        of_band = to_values(steps[:, each.kept] * of_token[:, None], each.band)
        start = 0
        for span in each.spans:
            width = span.stop - span.start
            values[:, span] = of_band[:, start : start + width]
            start += width
    _turn_keys(values, plan, first_token, backwards=False)
    return values


def _turn_keys(values: Float32s, plan: _Plan, first_token: int, *, backwards: bool) -> None:
    turns: dict[bytes, tuple[Any, Any]] = {}
    for each in plan.bands:
        if not each.keys:
            continue
        frequencies = each.band.frequencies
        name = frequencies.tobytes()
        if name not in turns:
            turns[name] = rotation.angles(frequencies, first_token, len(values))
        cosines, sines = turns[name]
        for span in each.keys:
            rotation.rotate(values[:, span], cosines, -sines if backwards else sines)


class BalancedCodec(TransformCodec):
    """The tier of a small, measured loss."""

    name = "balanced"
    codec_id = 4
    default_step = 0.003


class SmallCodec(TransformCodec):
    """The tier for thin links, whose loss shows."""

    name = "small"
    codec_id = 5
    default_step = 0.006
