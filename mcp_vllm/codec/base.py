"""The contract of a codec, and the codec that changes nothing.

Codecs are shared by all threads of a pool and hold no state of their own; what a thread must own (a
zstandard context) lives in a ``threading.local``. Framing, keys and checksums are frame.py's job.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mcp_vllm.codec.errors import CodecError, FrameError
from mcp_vllm.codec.layout import ChunkLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

MAX_PARTS = 12


def flat_bytes(buffer: Buffer) -> memoryview:
    """The same memory as one axis of unsigned bytes; CodecError if it is not contiguous."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise CodecError("a chunk must be one contiguous buffer; copy it into one first")
    # cast() refuses views whose shape has a zero in it.
    return view.cast("B") if view.nbytes else memoryview(bytearray())


@dataclass(frozen=True)
class Encoded:
    """``parts``, at most MAX_PARTS, and the codec that they are of.

    That is the codec which was asked, or one that took its place: a lossy codec leaves to a
    lossless one what it does not understand.
    """

    codec: Codec
    parts: Sequence[Buffer]


class Codec(ABC):
    """Turns the raw bytes of a chunk into parts, and back.

    Both directions may be called from any thread and release the GIL for most of their time.
    """

    name: ClassVar[str]
    codec_id: ClassVar[int]
    lossless: ClassVar[bool]

    @abstractmethod
    def encode(self, raw: Buffer, layout: ChunkLayout) -> Encoded:
        """Buffers that may alias ``raw``; ``raw`` itself is not modified."""

    @abstractmethod
    def decode_into(self, parts: Sequence[Buffer], out: memoryview, layout: ChunkLayout) -> None:
        """Fill ``out`` (uint8, writable, exactly the raw size) from the parts.

        Parts are untrusted: anything wrong with them is a FrameError, memory stays within a small
        multiple of ``len(out)``, and after an error the content of ``out`` is undefined. A lossless
        codec heeds nothing of the layout but its element and channels, which the frame carries.
        """


class RawCodec(Codec):
    """The identity; also what a frame falls back to when nothing else makes it smaller."""

    name = "raw"
    codec_id = 0
    lossless = True

    def encode(self, raw: Buffer, layout: ChunkLayout) -> Encoded:
        return Encoded(self, [flat_bytes(raw)])

    def decode_into(self, parts: Sequence[Buffer], out: memoryview, layout: ChunkLayout) -> None:
        if len(parts) != 1 or memoryview(parts[0]).nbytes != out.nbytes:
            raise FrameError("a raw frame holds one part of exactly the raw size")
        # numpy copies without the GIL, a memoryview does not.
        np.copyto(np.frombuffer(out, np.uint8), np.frombuffer(flat_bytes(parts[0]), np.uint8))
