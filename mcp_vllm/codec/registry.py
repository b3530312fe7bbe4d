"""Which codecs exist, by the name a user configures and by the id a frame carries.

Ids are part of the frame format: never reuse one.
"""

import difflib

from mcp_vllm.codec.base import Codec, RawCodec
from mcp_vllm.codec.byte_planes import DEFAULT_LEVEL, BytePlaneZstdCodec
from mcp_vllm.codec.errors import CodecError, FrameError

LOSSLESS_NAME = "lossless"
_NAME_OF_ID = {0: RawCodec.name, 1: BytePlaneZstdCodec.name, 2: LOSSLESS_NAME}
_NAMES = tuple(_NAME_OF_ID.values())


def codec_names() -> tuple[str, ...]:
    """Every name that get_codec knows."""
    return _NAMES


def get_codec(name: str, level: int = DEFAULT_LEVEL) -> Codec:
    """The codec of that name, ready to use; ``level`` is zstandard's, where the codec has one.

    The first call for ``lossless`` in a process loads its compiled kernels (and compiles them, once
    per installation, for some seconds): make it at start-up, not when the first chunk waits.
    """
    if name == RawCodec.name:
        return RawCodec()
    if name == BytePlaneZstdCodec.name:
        return BytePlaneZstdCodec(level)
    if name == LOSSLESS_NAME:
        # Here, not above: numba takes half a second to import, and only this codec needs it.
        from mcp_vllm.codec.lossless import LosslessCodec

        return LosslessCodec(level)
    nearest = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.0)[0]
    raise CodecError(
        f"unknown codec {name!r}; did you mean {nearest!r}? Known: {', '.join(_NAMES)}"
    )


def codec_name_of_id(codec_id: int) -> str:
    """The codec a frame names; FrameError when this version does not know it."""
    if codec_id not in _NAME_OF_ID:
        raise FrameError(f"codec id {codec_id} is not known to this version; update it")
    return _NAME_OF_ID[codec_id]
