"""Chunks of KV cache as compressed, self-describing, verified frames.

Everything another package may use is named here; docs/codec.md says which codec and layout to pick.
"""

from mcp_vllm.codec.base import Codec
from mcp_vllm.codec.errors import ChecksumError, CodecError, FrameError
from mcp_vllm.codec.frame import (
    FRAME_PREFIX_SIZE,
    FrameHeader,
    decode_frame_into,
    encode_frame,
    read_header,
)
from mcp_vllm.codec.layout import ChunkLayout
from mcp_vllm.codec.planes import KVLayout, Plane
from mcp_vllm.codec.registry import codec_names, get_codec, lossless_names, needs_calibration

__all__ = [
    "FRAME_PREFIX_SIZE",
    "ChecksumError",
    "ChunkLayout",
    "Codec",
    "CodecError",
    "FrameError",
    "FrameHeader",
    "KVLayout",
    "Plane",
    "codec_names",
    "decode_frame_into",
    "encode_frame",
    "get_codec",
    "lossless_names",
    "needs_calibration",
    "read_header",
]
