"""What the bytes of a chunk mean: the element type and the channel axis.

A layout never decides whether bytes survive (they always do), only how well they compress.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from mcp_vllm.codec.errors import CodecError

Element = Literal["bf16", "f16", "f32", "f8", "u8"]

ELEMENTS: tuple[Element, ...] = get_args(Element)
ELEMENT_SIZE_BYTES: dict[Element, int] = {"bf16": 2, "f16": 2, "f32": 4, "f8": 1, "u8": 1}
MAX_CHANNELS = 2**32 - 1


@dataclass(frozen=True)
class ChunkLayout:
    """Element type and channel axis of a chunk.

    ``channels`` is the length, in elements, of the contiguous innermost axis: two elements that far
    apart belong to the same channel of neighbouring tokens. 1 means unknown. See docs/codec.md for
    what to pass for each vLLM page layout.
    """

    element: Element
    channels: int = 1

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise CodecError(f"element {self.element!r} is not one of {', '.join(ELEMENTS)}")
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise CodecError(f"channels={self.channels} is outside 1..{MAX_CHANNELS}")

    @property
    def element_size_bytes(self) -> int:
        return ELEMENT_SIZE_BYTES[self.element]
