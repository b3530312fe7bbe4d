"""The tier `near-lossless`: 8 bits a value, scaled token by token, entropy-coded by channel.

The values of a head at a token are divided by a scale, their largest magnitude over 127, and
rounded: none is off by more than half a scale, and half a unit in the last place of the element.
The channels of a chunk are classed by their root mean square, since a static table per class needs
few bits to be told. Nothing needs to be known of the model.

Head: nothing. Parts: bf16 scales [token, source] and uint8 classes [channel], zstandard of byte
planes; the rANS stream; its escapes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mcp_vllm.codec import integers, tables
from mcp_vllm.codec.byte_planes import compressor, decompress_exactly
from mcp_vllm.codec.errors import FrameError
from mcp_vllm.codec.lossy import LossyCodec
from mcp_vllm.codec.values import to_float32

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from mcp_vllm.codec.kernel import Float32s, UInt8s, UInt16s
    from mcp_vllm.codec.planes import KVLayout

LARGEST = 127
_LEVEL = 1
# Root mean squares of classes: two to an octave, of integers.
_BOUNDS = np.array([0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.7, 8, 11.3, 16, 22.6, 32, 45.2, 64, 90.5])
_NUM_CLASSES = len(_BOUNDS) + 1
_REACH = 16.0


@cache
def _tables() -> tables.Tables:
    """For values spread like a Gaussian of 0.85 of the class's deviation in 7 of 8 cases, else 1.7:
    a class holds channels of differing spread.
    """
    middles = np.append(0.3, _BOUNDS * 1.19)
    return tables.of_tail(_tail(), _REACH, middles)


def _tail() -> Float32s:
    """P(|x| > _REACH * (i / 256)**2) of the mixture, in exactly rounded operations only."""
    points = (np.arange(256) / 256.0) ** 2 * _REACH
    narrow, wide = _gaussian_tail(points / 0.85), _gaussian_tail(points / 1.7)
    tail: Float32s = (0.875 * narrow + 0.125 * wide).astype(np.float32)
    return tail


def _gaussian_tail(points: Any) -> Any:
    """P(|x| > point), the density summed in steps of 1/64 and cut off at 32."""
    per_unit, ratio, factor = 64, 0.9998779371423917, 0.9997558891872461  # e**(-1/8192), its square
    density = [1.0]
    for _ in range(32 * per_unit):
        density.append(density[-1] * ratio)
        ratio *= factor
    density[0] = 0.5
    beyond = np.cumsum(np.array(density)[::-1])[::-1]
    beyond = np.append(beyond / beyond[0], 0.0)
    position = np.minimum(points, 31.9) * per_unit
    low = np.floor(position).astype(np.int64)
    return beyond[low] + (beyond[low + 1] - beyond[low]) * (position - low)


class NearLosslessCodec(LossyCodec):
    """See the module's docstring."""

    name = "near-lossless"
    codec_id = 3
    NUM_PARTS = 3

    def encode_values(
        self, values: Float32s, kv: KVLayout, first_token: int
    ) -> tuple[bytes, Sequence[Buffer]] | None:
        starts, widths = _heads(kv)
        largest = np.maximum.reduceat(np.abs(values), starts, axis=1)
        if not np.isfinite(largest).all():
            return None
        scales = _round_up((largest / LARGEST).astype(np.float32))
        with np.errstate(all="ignore"):  # An inverse may overflow: then values do not fit below.
            inverse = np.divide(
                1, to_float32(scales), where=scales != 0, out=np.zeros_like(largest)
            )
            values *= np.repeat(inverse, widths, axis=1)
        classes = _classes(values)
        coded = integers.encode(values, _columns(classes))
        if coded is None:
            return None
        side = compressor(_LEVEL).compress(_byte_planes(scales) + classes.tobytes())
        return b"", [side, *coded]

    def decode_values(
        self, head: memoryview, parts: list[memoryview], kv: KVLayout, tokens: range
    ) -> Float32s:
        if len(head):
            raise FrameError("a near-lossless frame has a longer head than it needs")
        _, widths = _heads(kv)
        num_scales = len(tokens) * len(widths)
        side = np.frombuffer(
            decompress_exactly(parts[0], 2 * num_scales + kv.num_channels), np.uint8
        )
        classes = side[2 * num_scales :]
        if classes.max() >= _NUM_CLASSES:
            raise FrameError("a near-lossless frame names a class without a table")
        scales = side[:num_scales] | side[num_scales : 2 * num_scales].astype(np.uint16) << 8
        factors = to_float32(scales.reshape(len(tokens), len(widths)))
        if not np.isfinite(factors).all():
            raise FrameError("a near-lossless frame holds a scale that is no number")
        values = integers.decode(parts[1], parts[2], len(tokens), _columns(classes))
        with np.errstate(over="ignore"):
            values *= np.repeat(factors, widths, axis=1)
        return np.nan_to_num(values, copy=False)


def _heads(kv: KVLayout) -> tuple[list[int], list[int]]:
    """First column and width of each source."""
    spans = kv.columns.values()
    return [span.start for span in spans], [span.stop - span.start for span in spans]


def _round_up(positive: Float32s) -> UInt16s:
    """bf16 bits of the next value that is not smaller."""
    return ((positive.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)


def _byte_planes(scales: UInt16s) -> bytes:
    return (scales & np.uint16(0xFF)).astype(np.uint8).tobytes() + (scales >> np.uint16(8)).astype(
        np.uint8
    ).tobytes()


def _classes(values: Float32s) -> UInt8s:
    """uint8 [channel]"""
    mean_squares = np.einsum("tc,tc->c", values, values) / np.float32(len(values))
    classes: UInt8s = np.searchsorted(_BOUNDS**2, mean_squares, side="right").astype(np.uint8)
    return classes


def _columns(classes: UInt8s) -> integers.Columns:
    narrow = np.full(len(classes), -1, np.int64)
    return integers.Columns(np.ascontiguousarray(classes), narrow, _tables())
