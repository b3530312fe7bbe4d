"""Which codecs exist, by the name a user configures and by the id a frame carries.

Ids are part of the frame format: never reuse one.
"""

import difflib

from mcp_vllm.codec.base import Codec, RawCodec
from mcp_vllm.codec.byte_planes import DEFAULT_LEVEL, BytePlaneZstdCodec
from mcp_vllm.codec.errors import CodecError, FrameError

_CODECS: tuple[type[Codec], ...] = (RawCodec, BytePlaneZstdCodec)
_BY_NAME = {codec.name: codec for codec in _CODECS}
_BY_ID = {codec.codec_id: codec for codec in _CODECS}


def codec_names() -> tuple[str, ...]:
    """Every name that get_codec knows."""
    return tuple(_BY_NAME)


def get_codec(name: str, level: int = DEFAULT_LEVEL) -> Codec:
    """The codec of that name, ready to use; ``level`` is zstandard's, where the codec has one."""
    if name == BytePlaneZstdCodec.name:
        return BytePlaneZstdCodec(level)
    if name in _BY_NAME:
        return _BY_NAME[name]()
    nearest = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.0)[0]
    raise CodecError(
        f"unknown codec {name!r}; did you mean {nearest!r}? Known: {', '.join(_BY_NAME)}"
    )


def codec_of_id(codec_id: int) -> type[Codec]:
    """The codec a frame names; FrameError when this version does not know it."""
    if codec_id not in _BY_ID:
        raise FrameError(f"codec id {codec_id} is not known to this version")
    return _BY_ID[codec_id]
