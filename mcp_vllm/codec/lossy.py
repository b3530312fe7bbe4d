"""What the lossy codecs share: which tokens are coded how, and what the decoder is told of it.

Parts of an encoded chunk:

1. head: digest of the layout (uint8[8]), number of the chunk's first token in its context (uint32),
   number of exact tokens (uint16), then what the codec adds
2. on: the parts of the codec, NUM_PARTS, for all other tokens
3. on: the exact tokens [token, channel], as the parts of `lossless`

The first tokens of a context are kept exact: attention leans on them far more than on any other
(*attention sinks*). A chunk that is no KV of finite floats is coded by `lossless` as a whole.
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mcp_vllm.codec.base import Codec, Encoded, flat_bytes
from mcp_vllm.codec.errors import CodecError, FrameError
from mcp_vllm.codec.layout import FLOAT_ELEMENTS
from mcp_vllm.codec.loss import NUM_EXACT_TOKENS
from mcp_vllm.codec.lossless import LosslessCodec
from mcp_vllm.codec.values import (
    elements_of,
    from_float32,
    gather,
    scatter,
    to_float32,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from mcp_vllm.codec.kernel import Float32s
    from mcp_vllm.codec.layout import ChunkLayout
    from mcp_vllm.codec.planes import KVLayout

_HEAD = struct.Struct("<8sIH")


class LossyCodec(Codec):
    """``num_exact_tokens``: how many tokens at the front of a context are kept bit for bit."""

    lossless = False
    NUM_PARTS: ClassVar[int]

    def __init__(self, num_exact_tokens: int = NUM_EXACT_TOKENS) -> None:
        if not 0 <= num_exact_tokens <= 0xFFFF:
            raise CodecError(f"{num_exact_tokens} exact tokens are outside 0..65535")
        self.num_exact_tokens = num_exact_tokens
        self._lossless = LosslessCodec()

    @abstractmethod
    def encode_values(
        self, values: Float32s, kv: KVLayout, first_token: int
    ) -> tuple[bytes, Sequence[Buffer]] | None:
        """What to add to the head, and NUM_PARTS parts, of values [token, channel].

        ``values`` may be changed; ``first_token`` counts from the front of the context. None when a
        value is not finite, or too large.
        """

    @abstractmethod
    def decode_values(
        self, head: memoryview, parts: list[memoryview], kv: KVLayout, tokens: range
    ) -> Float32s:
        """Finite values [token, channel] of these tokens of the context, from untrusted parts."""

    def encode(self, raw: Buffer, layout: ChunkLayout) -> Encoded:
        source = flat_bytes(raw)
        kv = _kv_of(source, layout)
        first_token = layout.num_tokens_before
        num_exact = max(self.num_exact_tokens - first_token, 0)
        if kv is None or num_exact >= kv.num_tokens:
            return self._lossless.encode(source, layout)
        rows = gather(elements_of(source, layout.element), kv)
        coded = self.encode_values(to_float32(rows[num_exact:]), kv, first_token + num_exact)
        if coded is None:
            return self._lossless.encode(source, layout)
        head, parts = coded
        head = _HEAD.pack(kv.digest, first_token, num_exact) + head
        return Encoded(self, [head, *parts, *self._encode_exact(rows[:num_exact], layout, kv)])

    def _encode_exact(
        self, rows: NDArray[Any], layout: ChunkLayout, kv: KVLayout
    ) -> Sequence[Buffer]:
        if not len(rows):
            return []
        return self._lossless.encode(rows.data, _layout_of_rows(layout, kv)).parts

    def decode_into(self, parts: Sequence[Buffer], out: memoryview, layout: ChunkLayout) -> None:
        kv = _kv_of(out, layout)
        if kv is None:
            raise CodecError(f"a {self.name} frame needs the KV layout of its chunk to be decoded")
        views = [flat_bytes(part) for part in parts]
        own = 1 + self.NUM_PARTS
        if len(views) < own or len(views[0]) < _HEAD.size:
            raise FrameError(f"a {self.name} frame lacks parts")
        digest, first_token, num_exact = _HEAD.unpack_from(views[0])
        if digest != kv.digest:
            raise FrameError("frame was made of other layers or heads, or another number of tokens")
        if num_exact >= kv.num_tokens or bool(num_exact) != (len(views) > own):
            raise FrameError(f"a {self.name} frame holds {num_exact} exact tokens, or lacks them")
        elements = elements_of(out, layout.element)
        rows = np.empty((kv.num_tokens, kv.num_channels), elements.dtype)
        if num_exact:
            exact = rows[:num_exact].data.cast("B")
            self._lossless.decode_into(views[own:], exact, _layout_of_rows(layout, kv))
        tokens = range(first_token + num_exact, first_token + kv.num_tokens)
        values = self.decode_values(views[0][_HEAD.size :], views[1:own], kv, tokens)
        rows[num_exact:] = from_float32(values, elements.dtype)
        scatter(rows, elements, kv)


def _kv_of(chunk: memoryview, layout: ChunkLayout) -> KVLayout | None:
    """The layout's planes, if the chunk is floats of just their size."""
    kv = layout.kv
    if kv is None or layout.element not in FLOAT_ELEMENTS:
        return None
    return kv if chunk.nbytes == kv.num_elements * layout.element_size_bytes else None


def _layout_of_rows(layout: ChunkLayout, kv: KVLayout) -> ChunkLayout:
    return replace(layout, channels=kv.num_channels, kv=None, position=0, first_token=None)
