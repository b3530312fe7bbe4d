"""What the bytes of a chunk mean: the element type and the channel axis.

For a lossless codec a layout never decides whether bytes survive (they always do), only how well
they compress.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from mcp_vllm.codec.errors import CodecError
from mcp_vllm.codec.planes import KVLayout

Element = Literal["bf16", "f16", "f32", "f8", "u8"]

ELEMENTS: tuple[Element, ...] = get_args(Element)
ELEMENT_SIZE_BYTES: dict[Element, int] = {"bf16": 2, "f16": 2, "f32": 4, "f8": 1, "u8": 1}
# What lossy codecs take.
FLOAT_ELEMENTS: tuple[Element, ...] = ("bf16", "f16", "f32")
MAX_CHANNELS = 2**32 - 1
MAX_TOKENS = 2**31


@dataclass(frozen=True)
class ChunkLayout:
    """Element type and channel axis of a chunk.

    ``channels`` is the length, in elements, of the contiguous innermost axis: two elements that far
    apart belong to the same channel of neighbouring tokens. 1 means unknown. See docs/codec.md for
    what to pass for each vLLM page layout.

    Lossy codecs need to know more, and code without loss where they do not:

    Attributes:
        kv: where the K and V of each layer lie; None: unknown. Not in the frame.
        position: how many chunks precede this one in its context; all chunks of a ``kv`` have
            equally many tokens. A chunk whose position is not told counts as the first.
        first_token: where in its context the chunk begins, if ``position`` chunks do not say so.
    """

    element: Element
    channels: int = 1
    kv: KVLayout | None = None
    position: int = 0
    first_token: int | None = None

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise CodecError(f"element {self.element!r} is not one of {', '.join(ELEMENTS)}")
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise CodecError(f"channels={self.channels} is outside 1..{MAX_CHANNELS}")
        if not 0 <= self.num_tokens_before <= MAX_TOKENS:
            raise CodecError(f"position={self.position} is past the token {MAX_TOKENS}")

    @property
    def num_tokens_before(self) -> int:
        """Tokens of the context before the chunk; chunks of unknown ``kv`` count as one."""
        if self.first_token is not None:
            return self.first_token
        return self.position * (self.kv.num_tokens if self.kv else 1)

    @property
    def element_size_bytes(self) -> int:
        return ELEMENT_SIZE_BYTES[self.element]
