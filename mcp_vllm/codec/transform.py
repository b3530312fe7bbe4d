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
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mcp_vllm.codec import bands, integers
from mcp_vllm.codec.bands import MAX_SHIFT
from mcp_vllm.codec.byte_planes import compressor, decompress_exactly
from mcp_vllm.codec.calibration import FINGERPRINT_SIZE, MAX_LEVEL, Band, Calibration
from mcp_vllm.codec.errors import CodecError, FrameError
from mcp_vllm.codec.loss import NUM_EXACT_TOKENS
from mcp_vllm.codec.lossy import LossyCodec
from mcp_vllm.codec.multiply import whole_rows
from mcp_vllm.codec.transform_plan import ROUNDING, TransformPlan, plan_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from mcp_vllm.codec.kernel import Float32s
    from mcp_vllm.codec.planes import KVLayout

    Int8s = NDArray[np.int8]

_HEAD = struct.Struct(f"<{FINGERPRINT_SIZE}sf")
_MAX_STEP = 1e6
_MIN_STEP = 1e-6
_ZSTD_LEVEL = 1
# Of levels -MAX_LEVEL to MAX_LEVEL: how much coarser a token's step is.
_COARSER = (2.0 ** (np.arange(-MAX_LEVEL, MAX_LEVEL + 1) / 2.0)).astype(np.float32)


def to_coefficients(values: Any, band: Band, num_kept: int) -> Any:
    """[token, channel] to the first coefficients, [token, coefficient]; of arrays or tensors."""
    mean, analysis = _of_kind(values, band.mean, band.analysis)
    return (values - mean) @ analysis[:, :num_kept]


def to_values(coefficients: Any, band: Band) -> Any:
    """The inverse of to_coefficients, as far as coefficients were kept."""
    mean, synthesis = _of_kind(coefficients, band.mean, band.synthesis)
    return coefficients @ synthesis[: coefficients.shape[1]] + mean


def _of_kind(values: Any, *arrays: Float32s) -> tuple[Any, ...]:
    """The arrays as tensors where ``values`` is one, on its device."""
    if isinstance(values, np.ndarray):
        return arrays
    return tuple(values.new_tensor(array) for array in arrays)


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
        plan = plan_of(self.calibration, kv, self.step)
        coefficients, levels, shifts = _coefficients(values, plan, first_token, self.step)
        coded = integers.encode(coefficients, plan.columns, shifts, ROUNDING)
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
        plan = plan_of(self.calibration, kv, step)
        shifts, levels = _unpacked(parts[0], len(plan.bands), len(tokens))
        steps = integers.decode(parts[1], parts[2], len(tokens), plan.columns, shifts)
        return _values(steps, levels, plan, tokens.start, step, kv.num_channels)


def _packed(shifts: Any, levels: Any) -> bytes:
    """Both int8 [token, band], moved to where they are not negative, band by band."""
    planes = np.stack([(shifts + MAX_SHIFT).T, (levels + MAX_LEVEL).T]).astype(np.uint8)
    return compressor(_ZSTD_LEVEL).compress(planes.tobytes())


def _unpacked(part: memoryview, num_bands: int, num_tokens: int) -> tuple[Any, Any]:
    """The inverse of _packed, of an untrusted part."""
    unpacked = np.frombuffer(decompress_exactly(part, 2 * num_bands * num_tokens), np.uint8)
    moved = unpacked.reshape(2, num_bands, num_tokens)
    if moved[0].max(initial=0) > 2 * MAX_SHIFT or moved[1].max(initial=0) > 2 * MAX_LEVEL:
        raise FrameError("a lossy part moves coefficients past the tables")
    shifts, levels = moved.astype(np.int8)
    shifts -= np.int8(MAX_SHIFT)
    levels -= np.int8(MAX_LEVEL)
    return np.ascontiguousarray(shifts.T), np.ascontiguousarray(levels.T)


def _coefficients(
    values: Float32s, plan: TransformPlan, first_token: int, step: float
) -> tuple[Float32s, Int8s, Int8s]:
    """In steps of their token, not yet rounded: float32 [token, kept coefficient]; the levels of
    these steps, and by how many half octaves they spread more than usual: int8 [token, band].
    """
    num_tokens, num_rows = len(values), whole_rows(len(values))
    factors = plan.channels.empty(num_tokens)
    angles = plan.angles(first_token, num_tokens)
    bands.take_out(values, plan.spans, plan.means, *angles, plan.channels.places, num_rows, factors)
    products = np.empty(num_rows * plan.products.num_columns, np.float32)
    of_bands = plan.channels.each(factors, num_rows), plan.products.each(products, num_rows)
    for band, *blocks in zip(plan.bands, *of_bands, strict=True):
        band.analysis_panels.multiply(*blocks)
    coefficients = np.empty((num_tokens, plan.num_kept), np.float32)
    levels, shifts = np.empty((2, num_tokens, len(plan.bands)), np.int8)
    finer = np.float32(1.0 / step) / _COARSER
    bands.weigh(
        products, plan.products.places, num_rows, plan.kept, plan.usual_levels, finer,
        plan.inverse_deviations, plan.usual_magnitude, levels, shifts, coefficients,
    )  # fmt: skip
    return coefficients, levels, shifts


def _values(
    steps: Float32s,
    levels: Int8s,
    plan: TransformPlan,
    first_token: int,
    step: float,
    num_channels: int,
) -> Float32s:
    """The inverse of _coefficients; always finite."""
    num_tokens, num_rows = len(steps), whole_rows(len(steps))
    factors = plan.coefficients.empty(num_tokens)
    coarser = np.float32(step) * _COARSER
    bands.spread(steps, levels, coarser, plan.coefficients.places, num_rows, factors)
    restored = np.empty(num_rows * plan.restored.num_columns, np.float32)
    of_bands = plan.coefficients.each(factors, num_rows), plan.restored.each(restored, num_rows)
    for band, *blocks in zip(plan.bands, *of_bands, strict=True):
        band.synthesis_panels.multiply(*blocks)
    values = np.empty((num_tokens, num_channels), np.float32)
    angles = plan.angles(first_token, num_tokens)
    bands.put_back(
        restored, plan.spans, plan.means, *angles, plan.restored.places, num_rows, values
    )
    return values


class BalancedCodec(TransformCodec):
    """The tier of a small, measured loss."""

    name = "balanced"
    codec_id = 4
    default_step = 0.003


class SmallCodec(TransformCodec):
    """The tier for thin links, whose loss shows."""

    name = "small"
    codec_id = 5
    default_step = 0.007
