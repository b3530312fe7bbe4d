"""From two contexts to the delta between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from mcp_vllm.codec import Codec, encode_frame, get_codec
from mcp_vllm.codec.loss import EXACT
from mcp_vllm.session.delta import frames as delta_frames
from mcp_vllm.session.delta import wire
from mcp_vllm.session.delta.arrays import HostArray, flat_bytes_of, host_arrays
from mcp_vllm.session.delta.decompress import assemble, decode_coded_parts
from mcp_vllm.session.delta.errors import DeltaError
from mcp_vllm.session.delta.overlap import Overlap, longest_overlap

if TYPE_CHECKING:
    from mcp_vllm.codec.calibration import Calibration


def compress_context(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    codec: str = "lossless",
    held: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    first_tokens: Mapping[str, int] | None = None,
) -> bytes:
    """The delta that turns ``old`` into ``new``: what `decompress_context` needs beside ``old``.

    Both map names to numpy arrays or torch CPU tensors (bf16, f16, f32, f64, f8, integers, bool),
    of any shape and strides; neither is modified. Only what ``old`` lacks is coded, as
    docs/deltas.md says; an empty ``old`` gives a full export.

    ``codec`` is a name of `mcp_vllm.codec.codec_names`. With `near-lossless` (floats of two axes
    and more, tokens on the one before the last; all else stays exact) the delta says so, and the
    receiver ends up with something else than ``new``: keep it as
    ``held = decompress_context(held, delta)`` and pass it with the next delta, as what the receiver
    holds in place of ``old``. What was sent once is not sent, nor changed, again.

    `balanced` and `small` need the model's ``calibration``, and treat so the K and V of a layer N
    that are named ``layers.N.keys`` and ``layers.N.values``, [1, head, token, channel].
    ``first_tokens``: at which token of the context an array begins, by name, where that is not its
    first: of sliding windows. Receivers must compute the same last bits, as CPUs of one kind do;
    another finds that the result does not match its checksum.

    Raises ArrayError for an array that cannot be part of a context, CodecError for an unknown codec
    or one that lacks its calibration, or is given that of another model.
    """
    old_arrays, new_arrays = host_arrays(old), host_arrays(new)
    held_arrays = old_arrays if held is None else host_arrays(held)
    _check_held(old_arrays, held_arrays)
    changed, coded = _changes(old_arrays, new_arrays)
    chosen = get_codec(codec, calibration=calibration)
    loss = EXACT if chosen.lossless else chosen.name
    plans = delta_frames.frame_plans(changed, loss, first_tokens or {})
    frames = _encode(plans, coded, chosen)
    if loss != EXACT:
        changed = _with_received_digests(changed, frames, held_arrays, loss, calibration)
    metadata = wire.Metadata(
        base={name: array.digest() for name, array in sorted(held_arrays.items())},
        removed=sorted(old_arrays.keys() - new_arrays.keys()),
        changed=changed,
        loss=loss,
    )
    return wire.pack(metadata, frames)


def _check_held(old: Mapping[str, HostArray], held: Mapping[str, HostArray]) -> None:
    for name in old.keys() | held.keys():
        ours, theirs = old.get(name), held.get(name)
        if not ours or not theirs or (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            raise DeltaError(
                f"{name}: `held` must have the arrays of `old`, of the same types and shapes"
            )


def _changes(
    old: Mapping[str, HostArray], new: Mapping[str, HostArray]
) -> tuple[list[wire.ChangedArray], list[memoryview]]:
    """The arrays that differ, and the bytes of each that its base lacks."""
    changed: list[wire.ChangedArray] = []
    coded: list[memoryview] = []
    for name, array in new.items():
        base = old.get(name)
        if base and _equal(base, array):
            continue
        entry = _describe(name, array, base)
        rest = array.bits
        if entry.kept:
            rest = np.moveaxis(np.moveaxis(rest, entry.axis, 0)[entry.kept :], 0, entry.axis)
        changed.append(entry)
        coded.append(flat_bytes_of(rest))
    return changed, coded


def _equal(old: HostArray, new: HostArray) -> bool:
    return old.dtype == new.dtype and old.shape == new.shape and np.array_equal(old.bits, new.bits)


def _describe(name: str, array: HostArray, base: HostArray | None) -> wire.ChangedArray:
    comparable = base is not None and base.dtype == array.dtype
    overlap = longest_overlap(base.bits, array.bits) if base and comparable else Overlap()
    return wire.ChangedArray(
        name=name,
        library=array.library,
        dtype=array.dtype,
        shape=array.shape,
        axis=overlap.axis,
        start=overlap.start,
        kept=overlap.length,
        digest=array.digest(),
    )


def _encode(
    plans: Iterable[delta_frames.FramePlan], coded: Sequence[memoryview], codec: Codec
) -> list[bytes]:
    exact = codec if codec.lossless else get_codec("lossless")
    frames: list[bytes] = []
    for number, plan in enumerate(plans):
        raw = b"".join(coded[each.index][each.start : each.stop] for each in plan.slices)
        chosen = codec if plan.layout.kv else exact
        frames.append(encode_frame(delta_frames.frame_key(number), raw, plan.layout, chosen))
    return frames


def _with_received_digests(
    changed: list[wire.ChangedArray],
    frames: Sequence[bytes],
    held: Mapping[str, HostArray],
    loss: str,
    calibration: Calibration | None,
) -> list[wire.ChangedArray]:
    """The same entries, with the digests of what the receiver will have."""
    sent = memoryview(b"".join(frames))
    coded = decode_coded_parts(changed, sent, len(frames), loss, calibration)
    return [
        msgspec.structs.replace(entry, digest=assemble(entry, part, held).digest())
        for entry, part in zip(changed, coded, strict=True)
    ]
