"""Floats of a chunk as float32 [token, channel], whatever their arrangement in its bytes, and back.

Channels are ordered by layer, kind and head: `KVLayout.columns`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mcp_vllm.codec.kernel import Float32s, UInt16s, kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcp_vllm.codec.layout import Element
    from mcp_vllm.codec.planes import KVLayout, Plane

# bf16 has no numpy dtype of its own.
_DTYPES: dict[Element, Any] = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}


def elements_of(chunk: memoryview, element: Element) -> NDArray[Any]:
    """The chunk's flat elements, sharing its memory; bf16 as its bits."""
    elements: NDArray[Any] = np.frombuffer(chunk, _DTYPES[element])
    return elements


def to_float32(elements: NDArray[Any]) -> Float32s:
    """The same values; uint16 is taken as bf16."""
    if elements.dtype == np.uint16:
        return (elements.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return elements.astype(np.float32)


@kernel("(Array(float32, 1, 'C', readonly=True), uint16[::1])")
def _to_bf16(values: Float32s, bits: UInt16s) -> None:
    wide = values.view(np.uint32)
    for index in range(wide.size):
        odd = (wide[index] >> np.uint32(16)) & np.uint32(1)
        rounded = (wide[index] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        overflown = (rounded & np.uint32(0x7FFF)) == np.uint32(0x7F80)
        bits[index] = np.uint16(rounded - np.uint32(overflown))


def from_float32(values: Float32s, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Rounded to nearest, ties to even, of finite values; for uint16 to bf16 bits.

    What is too large for the dtype becomes its largest finite value.
    """
    if dtype == np.uint16:
        bits = np.empty(values.shape, np.uint16)
        _to_bf16(values.reshape(-1), bits.reshape(-1))
        return bits
    if dtype == np.float16:
        return np.clip(values, -65504, 65504).astype(np.float16)
    return values


def gather(elements: NDArray[Any], layout: KVLayout) -> NDArray[Any]:
    """Elements [token, channel] of a chunk's flat elements."""
    rows = np.empty((layout.num_tokens, layout.num_channels), elements.dtype)
    for plane, tokens, channels in layout.places:
        _of_plane(rows[tokens, channels], plane)[...] = _tokens_first(plane.of(elements))
    return rows


def scatter(rows: NDArray[Any], elements: NDArray[Any], layout: KVLayout) -> None:
    """The inverse of gather."""
    for plane, tokens, channels in layout.places:
        _tokens_first(plane.of(elements))[...] = _of_plane(rows[tokens, channels], plane)


def _of_plane(values: NDArray[Any], plane: Plane) -> NDArray[Any]:
    """Values [token, channel] of a plane as _tokens_first of its own view."""
    num_heads, token_groups, tokens, channel_groups, channels = plane.grouped_shape
    return values.reshape(token_groups, tokens, num_heads, channel_groups, channels)


def _tokens_first(of_plane: NDArray[Any]) -> NDArray[Any]:
    """Token group, token in it, head, channel group, channel in it; of Plane.of."""
    return of_plane.transpose(1, 2, 0, 3, 4)
