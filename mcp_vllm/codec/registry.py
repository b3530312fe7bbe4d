"""Which codecs exist, by the name a user configures and by the id a frame carries.

Ids are part of the frame format: never reuse one.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from mcp_vllm.codec.base import Codec, RawCodec
from mcp_vllm.codec.byte_planes import DEFAULT_LEVEL, BytePlaneZstdCodec
from mcp_vllm.codec.errors import CodecError, FrameError

if TYPE_CHECKING:
    from mcp_vllm.codec.calibration import Calibration

LOSSLESS_NAME = "lossless"
NEAR_LOSSLESS_NAME = "near-lossless"
BALANCED_NAME = "balanced"
SMALL_NAME = "small"
_NAME_OF_ID = {
    0: RawCodec.name,
    1: BytePlaneZstdCodec.name,
    2: LOSSLESS_NAME,
    3: NEAR_LOSSLESS_NAME,
    4: BALANCED_NAME,
    5: SMALL_NAME,
}
_NAMES = tuple(_NAME_OF_ID.values())
_FIRST_LOSSY_ID = 3
_CALIBRATED = (BALANCED_NAME, SMALL_NAME)


def codec_names() -> tuple[str, ...]:
    """Every name that get_codec knows."""
    return _NAMES


def lossless_names() -> tuple[str, ...]:
    """Of these, the codecs that give back the very bytes."""
    return tuple(name for number, name in _NAME_OF_ID.items() if is_lossless(number))


def needs_calibration(name: str) -> bool:
    """Whether get_codec wants the model's calibration for this codec."""
    return name in _CALIBRATED


def get_codec(
    name: str,
    level: int = DEFAULT_LEVEL,
    *,
    calibration: Calibration | None = None,
    step: float | None = None,
) -> Codec:
    """The codec of that name, ready to use; ``level`` is zstandard's, where the codec has one.

    ``calibration`` and ``step`` are for the calibrated tiers: the model's, and how coarse to be
    where the tier's own step does not suit (transform.py).

    The first call for any but ``raw`` and ``zstd`` in a process loads compiled kernels (and
    compiles them, once per installation, for some seconds): make it at start-up, not when a chunk
    waits.
    """
    if name not in _NAMES:
        nearest = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.0)[0]
        raise CodecError(
            f"unknown codec {name!r}; did you mean {nearest!r}? Known: {', '.join(_NAMES)}"
        )
    if step is not None and not needs_calibration(name):
        raise CodecError(f"codec {name!r} has no step; {' and '.join(_CALIBRATED)} have one")
    if name == RawCodec.name:
        return RawCodec()
    if name == BytePlaneZstdCodec.name:
        return BytePlaneZstdCodec(level)
    # Below, not above: numba takes half a second to import, and only these codecs need it.
    if name == LOSSLESS_NAME:
        from mcp_vllm.codec.lossless import LosslessCodec

        return LosslessCodec(level)
    if name == NEAR_LOSSLESS_NAME:
        from mcp_vllm.codec.near_lossless import NearLosslessCodec

        return NearLosslessCodec()
    if calibration is None:
        raise CodecError(
            f"codec {name!r} needs a calibration of the model;"
            " run `mcp-vllm codec calibrate MODEL` once, and give both engines its file"
        )
    from mcp_vllm.codec.transform import BalancedCodec, SmallCodec

    tier = BalancedCodec if name == BALANCED_NAME else SmallCodec
    return tier(calibration, step)


def is_lossless(codec_id: int) -> bool:
    """Whether frames of this codec, which is known, give back the very bytes."""
    return codec_id < _FIRST_LOSSY_ID


def codec_name_of_id(codec_id: int) -> str:
    """The codec a frame names; FrameError when this version does not know it."""
    if codec_id not in _NAME_OF_ID:
        raise FrameError(f"codec id {codec_id} is not known to this version; update it")
    return _NAME_OF_ID[codec_id]
