"""What the frames of a delta hold, as both sides work it out from its metadata.

The part of each changed array that its base lacks, in C order. Without loss: arrays of equal type
and channels one after another, cut into frames of FRAME_BYTES. With loss, what a lossy codec can
make something of comes first, whole arrays to a frame while they fit and have equally many tokens
(the axis before the last): of `near-lossless`, which scales values by token, floats of two axes and
more; of the calibrated ones the K and V of a layer, [1, head, token, channel], which are named as
those of a Hugging Face cache are. The first tokens of a context are exact there (lossy.py).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mcp_vllm.codec import ChunkLayout, KVLayout, Plane, needs_calibration
from mcp_vllm.codec.layout import FLOAT_ELEMENTS
from mcp_vllm.codec.loss import NUM_EXACT_TOKENS
from mcp_vllm.session.delta.wire import ChangedArray

FRAME_BYTES = 4 << 20

_FRAME_KEY = struct.Struct("<I")
_KV_NAME = re.compile(r"layers\.(\d{1,4})\.(keys|values)", re.ASCII)
_NOWHERE: Mapping[str, int] = {}


@dataclass(frozen=True)
class Slice:
    """Bytes ``start:stop`` of the coded part of the array at ``index`` of Metadata.changed."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class FramePlan:
    """One frame: its layout, and what its raw bytes are made of, in order."""

    layout: ChunkLayout
    slices: tuple[Slice, ...]

    @property
    def raw_bytes(self) -> int:
        return sum(each.stop - each.start for each in self.slices)


def frame_key(number: int) -> bytes:
    return _FRAME_KEY.pack(number)


def frame_plans(
    changed: Sequence[ChangedArray], loss: str, first_tokens: Mapping[str, int] = _NOWHERE
) -> Iterator[FramePlan]:
    """What each frame of a delta holds, in order.

    ``first_tokens``: where in its context an array begins, by name, for the one who encodes.
    """
    if loss and needs_calibration(loss):
        pairs = _kv_pairs(changed)
        lossy = {index for pair in pairs.values() for index in pair}
        yield from _pair_plans(changed, pairs, first_tokens)
    else:
        lossy = {index for index, array in enumerate(changed) if loss and _is_matrix(array)}
        yield from _matrix_plans(changed, lossy)
    yield from _flat_plans({i: array for i, array in enumerate(changed) if i not in lossy})


def _kv_pairs(changed: Sequence[ChangedArray]) -> dict[int, tuple[int, int]]:
    """By layer: the indices of its K and V, where both have changed alike."""
    found: dict[int, dict[str, int]] = {}
    for index, array in enumerate(changed):
        named = _KV_NAME.fullmatch(array.name)
        if named and _is_matrix(array) and len(array.shape) == 4 and array.shape[0] == 1:
            found.setdefault(int(named[1]), {})[named[2]] = index
    return {
        layer: (of["keys"], of["values"])
        for layer, of in sorted(found.items())
        if len(of) == 2 and _grew_alike(changed[of["keys"]], changed[of["values"]])
    }


def _grew_alike(keys: ChangedArray, values: ChangedArray) -> bool:
    by_tokens = not keys.kept or keys.axis == 2
    alike = (keys.shape, keys.dtype, keys.overlap) == (values.shape, values.dtype, values.overlap)
    return by_tokens and alike


def _pair_plans(
    changed: Sequence[ChangedArray],
    pairs: Mapping[int, tuple[int, int]],
    first_tokens: Mapping[str, int],
) -> Iterator[FramePlan]:
    """Layers one after the other; one that is larger than a frame has one of its own."""
    alike: dict[tuple[ChunkLayout, tuple[int, ...], int], list[int]] = {}
    for layer, (keys, _) in pairs.items():
        array = changed[keys]
        alike.setdefault((array.layout, array.coded_shape, array.kept), []).append(layer)
    for (layout, shape, kept), layers in alike.items():
        array = changed[pairs[layers[0]][0]]
        begun = replace(layout, first_token=first_tokens.get(array.name, 0) + kept)
        at_once = max(1, FRAME_BYTES // (2 * array.coded_bytes))
        for start in range(0, len(layers), at_once):
            some = {layer: pairs[layer] for layer in layers[start : start + at_once]}
            yield _plan_of_layers(some, begun, shape, array.coded_bytes)


def _plan_of_layers(
    pairs: Mapping[int, tuple[int, int]], layout: ChunkLayout, shape: tuple[int, ...], size: int
) -> FramePlan:
    _, num_heads, num_tokens, width = shape
    planes: list[Plane] = []
    slices: list[Slice] = []
    for layer, pair in pairs.items():
        for kind, index in zip(("k", "v"), pair, strict=True):
            offset = len(slices) * num_heads * num_tokens * width
            strides = (num_tokens * width, width, 1)
            planes.append(Plane(layer, kind, num_heads, num_tokens, width, offset, strides))  # type: ignore[arg-type]
            slices.append(Slice(index, 0, size))
    return FramePlan(replace(layout, kv=KVLayout(tuple(planes))), tuple(slices))


def _is_matrix(array: ChangedArray) -> bool:
    """Whether a lossy codec can make something of it: floats, with an axis of tokens."""
    is_float = array.layout.element in FLOAT_ELEMENTS
    return is_float and len(array.shape) > 1 and array.coded_bytes > 0


def _matrix_plans(changed: Sequence[ChangedArray], matrices: set[int]) -> Iterator[FramePlan]:
    alike: dict[tuple[ChunkLayout, int], list[int]] = {}
    for index in sorted(matrices):
        array = changed[index]
        is_later = array.kept >= NUM_EXACT_TOKENS
        layout = replace(array.layout, position=NUM_EXACT_TOKENS if is_later else 0)
        alike.setdefault((layout, array.coded_shape[-2]), []).append(index)
    for (layout, num_tokens), indices in alike.items():
        group: list[tuple[int, int]] = []
        room = FRAME_BYTES
        for index in indices:
            size = changed[index].coded_bytes
            if group and size > room:
                yield _plan_of(group, layout, num_tokens)
                group, room = [], FRAME_BYTES
            if size > FRAME_BYTES:
                yield from _pieces(index, size, layout)
            else:
                group.append((index, size))
                room -= size
        if group:
            yield _plan_of(group, layout, num_tokens)


def _plan_of(group: list[tuple[int, int]], layout: ChunkLayout, num_tokens: int) -> FramePlan:
    """Whole arrays, each a layer of its own."""
    planes, offset = [], 0
    width = layout.channels
    for index, size in group:
        num_heads = size // layout.element_size_bytes // (num_tokens * width)
        strides = (num_tokens * width, width, 1)
        planes.append(Plane(index, "latent", num_heads, num_tokens, width, offset, strides))
        offset += num_heads * num_tokens * width
    slices = tuple(Slice(index, 0, size) for index, size in group)
    return FramePlan(replace(layout, kv=KVLayout(tuple(planes))), slices)


def _pieces(index: int, size: int, layout: ChunkLayout) -> Iterator[FramePlan]:
    """Rows of one array that is larger than a frame; heads are not told apart."""
    row_bytes = layout.channels * layout.element_size_bytes
    piece = max(1, FRAME_BYTES // row_bytes) * row_bytes
    for start in range(0, size, piece):
        stop = min(size, start + piece)
        strides = (stop - start, layout.channels, 1)
        rows = (stop - start) // row_bytes
        plane = Plane(index, "latent", 1, rows, layout.channels, 0, strides)
        position = layout.position if start == 0 else NUM_EXACT_TOKENS
        kv = KVLayout((plane,))
        yield FramePlan(replace(layout, kv=kv, position=position), (Slice(index, start, stop),))


def _flat_plans(changed: Mapping[int, ChangedArray]) -> Iterator[FramePlan]:
    by_layout: dict[ChunkLayout, list[int]] = {}
    for index, array in changed.items():
        by_layout.setdefault(array.layout, []).append(index)
    for layout, indices in by_layout.items():
        slices: list[Slice] = []
        room = FRAME_BYTES
        for index in indices:
            position, size = 0, changed[index].coded_bytes
            while position < size:
                stop = min(size, position + room)
                slices.append(Slice(index, position, stop))
                room -= stop - position
                position = stop
                if room == 0:
                    yield FramePlan(layout, tuple(slices))
                    slices, room = [], FRAME_BYTES
        if slices:
            yield FramePlan(layout, tuple(slices))
