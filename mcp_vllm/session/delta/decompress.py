"""From a context and an untrusted delta to the next context.

The result is built beside the base, which is only read: an error leaves nothing half done.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mcp_vllm.codec import CodecError, decode_frame_into, read_header
from mcp_vllm.codec.base import flat_bytes
from mcp_vllm.codec.loss import is_acceptable
from mcp_vllm.session.delta import frames as delta_frames
from mcp_vllm.session.delta import wire
from mcp_vllm.session.delta.arrays import Bits, HostArray, empty_bits, host_arrays, library_array
from mcp_vllm.session.delta.errors import (
    DamagedDeltaError,
    LossNotAcceptedError,
    WrongBaseError,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from mcp_vllm.codec.calibration import Calibration

DEFAULT_MAX_BYTES = 16 << 30


def decompress_context(
    old: Mapping[str, Any],
    delta: Buffer,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    accept: Collection[str] = (),
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """The context that ``delta`` was made for, given the one it was made from.

    An array that did not change is the same object as in ``old``; the others are new, each of the
    library (numpy or torch) it was of when the delta was made. The order is that of ``old``, then
    that of the additions.

    ``max_bytes`` bounds the raw bytes of changed arrays; memory stays within about twice that, plus
    a few frames of 4 MiB.

    ``accept`` names the lossy codecs that the delta may have been coded with; none unless told.
    `balanced` and `small` also need the sender's ``calibration`` (then a layer of more than 4 MiB
    is a frame of its own).

    Raises, and then nothing was changed: LossNotAcceptedError; WrongBaseError when ``old`` is not
    the context the delta was made from; DamagedDeltaError when the delta is not intact or claims
    too much; ArrayError when an array needs a package that is not installed.
    """
    base = host_arrays(old)
    try:
        source = flat_bytes(delta)
    except CodecError as error:
        raise DamagedDeltaError(f"the delta cannot be read: {error}") from error
    metadata, frames, num_frames = wire.unpack(source, max_bytes=max_bytes)
    if not is_acceptable(metadata.loss, accept):
        raise LossNotAcceptedError(
            f"the delta was coded with loss, by {metadata.loss!r}; pass accept=[{metadata.loss!r}]"
            " if that will do, or ask for one without"
        )
    _check_base(metadata, base)
    for entry in metadata.changed:
        _check_overlap(entry, base)
    coded = decode_coded_parts(metadata.changed, frames, num_frames, metadata.loss, calibration)
    result = {name: value for name, value in old.items() if name not in metadata.removed}
    for index, entry in enumerate(metadata.changed):
        array = assemble(entry, coded[index], base)
        if array.digest() != entry.digest:
            raise DamagedDeltaError(f"{entry.name} does not match its checksum")
        result[entry.name] = library_array(array)
    return result


def _check_base(metadata: wire.Metadata, base: Mapping[str, HostArray]) -> None:
    for name, digest in metadata.base.items():
        if name not in base:
            raise WrongBaseError(
                f"the delta was made for a base with {name}, which is missing here"
            )
        if base[name].digest() != digest:
            raise WrongBaseError(
                f"{name} differs from that of the base the delta was made for "
                f"(here it is {base[name].dtype}{list(base[name].shape)})"
            )
    for name in base:
        if name not in metadata.base:
            raise WrongBaseError(f"the delta was made for a base without {name}")


def _check_overlap(entry: wire.ChangedArray, base: Mapping[str, HostArray]) -> None:
    """Whether the kept slab exists in the base, of the right type and shape."""
    if not entry.kept:
        return
    array = base.get(entry.name)
    axis, past = entry.axis, entry.start + entry.kept
    if (
        array is None
        or array.dtype != entry.dtype
        or len(array.shape) != len(entry.shape)
        or past > array.shape[axis]
        or (*array.shape[:axis], *array.shape[axis + 1 :])
        != (*entry.shape[:axis], *entry.shape[axis + 1 :])
    ):
        raise DamagedDeltaError(f"{entry.name} keeps what its base does not hold")


def decode_coded_parts(
    changed: Sequence[wire.ChangedArray],
    frames: memoryview,
    num_frames: int,
    loss: str,
    calibration: Calibration | None,
) -> list[Bits]:
    """What the frames hold of each changed array, in its coded shape; checksums verified."""
    plans = list(delta_frames.frame_plans(changed, loss))
    if len(plans) != num_frames:
        raise DamagedDeltaError(f"{num_frames} frames where {len(plans)} belong")
    parts = [empty_bits(entry.dtype, entry.coded_shape) for entry in changed]
    targets = [part.reshape(-1).view(np.uint8) for part in parts]
    scratch = bytearray(max((plan.raw_bytes for plan in plans), default=0))
    for number, plan in enumerate(plans):
        raw, key = memoryview(scratch)[: plan.raw_bytes], delta_frames.frame_key(number)
        try:
            size = read_header(frames, max_raw_size=len(raw)).frame_size
            kv = plan.layout.kv
            decode_frame_into(frames[:size], raw, key=key, kv=kv, calibration=calibration)
        except CodecError as error:
            raise DamagedDeltaError(f"frame {number} of the delta: {error}") from error
        frames = frames[size:]
        for each in plan.slices:
            size = each.stop - each.start
            targets[each.index][each.start : each.stop] = np.frombuffer(raw[:size], np.uint8)
            raw = raw[size:]
    if len(frames):
        raise DamagedDeltaError(f"{len(frames)} bytes follow the delta's last frame")
    return parts


def assemble(entry: wire.ChangedArray, coded: Bits, base: Mapping[str, HostArray]) -> HostArray:
    """The whole array: the slab of its base that it keeps, then what was coded."""
    if not entry.kept:
        return HostArray(coded, entry.dtype, entry.library)
    whole = empty_bits(entry.dtype, entry.shape)
    rows, kept = np.moveaxis(whole, entry.axis, 0), entry.kept
    rows[:kept] = np.moveaxis(base[entry.name].bits, entry.axis, 0)[entry.start :][:kept]
    rows[kept:] = np.moveaxis(coded, entry.axis, 0)
    return HostArray(whole, entry.dtype, entry.library)
