"""Where the K and V of each layer lie in a chunk: what a lossy codec must know of its bytes.

The receiver's engine says it, not the frame: a frame carries only the digest of the layout it was
made with (`KVLayout.digest`), and is refused where that differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import xxhash

from mcp_vllm.codec.errors import CodecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kind = Literal["k", "v", "latent"]


class Source(NamedTuple):
    """One head of one layer's K, V or latent: head_dim channels that mean the same at any token."""

    layer: int
    kind: Kind
    head: int


class Group(NamedTuple):
    """``size`` neighbours on an axis that are ``stride`` elements apart from each other."""

    size: int
    stride: int


_SINGLE = Group(1, 1)


@dataclass(frozen=True)
class Plane:
    """A [head, token, channel] tensor somewhere in the chunk.

    Attributes:
        layer: the model's own index of the layer, so that peers and calibrations agree on it.
        first_token: the tensor's first token, counted from the first of the chunk.
        offset: element at which the tensor starts.
        strides: in elements, of head, token and channel; of token or channel groups where those
            have more than one member.
        token_group, channel_group: pages packed for matrix tiles keep neighbours together.
    """

    layer: int
    kind: Kind
    num_heads: int
    num_tokens: int
    head_dim: int
    offset: int
    strides: tuple[int, int, int]
    first_token: int = 0
    token_group: Group = _SINGLE
    channel_group: Group = _SINGLE

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.num_tokens, self.head_dim

    @property
    def num_elements(self) -> int:
        return self.num_heads * self.num_tokens * self.head_dim

    @cached_property
    def grouped_shape(self) -> tuple[int, int, int, int, int]:
        """Head, token group, token in it, channel group, channel in it."""
        token, channel = self.token_group.size, self.channel_group.size
        return self.num_heads, self.num_tokens // token, token, self.head_dim // channel, channel

    @cached_property
    def grouped_strides(self) -> tuple[int, int, int, int, int]:
        """Of grouped_shape, in elements."""
        head, tokens, channels = self.strides
        return head, tokens, self.token_group.stride, channels, self.channel_group.stride

    def of(self, elements: NDArray[Any]) -> NDArray[Any]:
        """The view ``grouped_shape`` of this plane in a chunk's flat, contiguous elements."""
        size = elements.itemsize
        strides = [stride * size for stride in self.grouped_strides]
        return np.ndarray(self.grouped_shape, elements.dtype, elements, self.offset * size, strides)


@dataclass(frozen=True)
class KVLayout:
    """The planes of a chunk: they cover each element once, and have each token of each layer once.

    Raises CodecError when they do not.
    """

    planes: tuple[Plane, ...]

    def __post_init__(self) -> None:
        if not self.planes:
            raise CodecError("a KV layout needs planes; pass None where the layout is unknown")
        seen = np.zeros(self.num_elements, np.uint8)
        for plane in self.planes:
            steps = (plane.token_group.size, plane.channel_group.size, *plane.grouped_strides)
            if min(*plane.shape, plane.offset + 1, plane.first_token + 1, *steps) < 1:
                raise CodecError(f"a size, offset or stride is not positive in {plane}")
            if plane.num_tokens % steps[0] or plane.head_dim % steps[1]:
                raise CodecError(f"the tokens or channels of a plane are no whole groups: {plane}")
            grouped = zip(plane.grouped_shape, plane.grouped_strides, strict=True)
            reach = sum((n - 1) * s for n, s in grouped)
            if plane.offset + reach >= seen.size:
                raise CodecError(f"a plane reaches past the chunk's {seen.size} elements: {plane}")
            plane.of(seen)[...] += 1
        if (seen != 1).any():
            raise CodecError("the planes of a KV layout overlap")
        tokens: dict[tuple[int, Kind, int, int], list[range]] = {}
        for plane in self.planes:
            of_tensor = (plane.layer, plane.kind, plane.num_heads, plane.head_dim)
            past = plane.first_token + plane.num_tokens
            tokens.setdefault(of_tensor, []).append(range(plane.first_token, past))
        for of_tensor, ranges in tokens.items():
            if sorted(t for each in ranges for t in each) != list(range(self.num_tokens)):
                raise CodecError(
                    f"layer {of_tensor[0]} lacks some of the {self.num_tokens} tokens of the chunk,"
                    f" or has some twice, in its {of_tensor[1]!r}"
                )
        if len({of_tensor[:2] for of_tensor in tokens}) != len(tokens):
            raise CodecError("the planes of a layer differ in their number or size of heads")

    @cached_property
    def num_elements(self) -> int:
        return sum(plane.num_elements for plane in self.planes)

    @cached_property
    def num_tokens(self) -> int:
        return max(plane.first_token + plane.num_tokens for plane in self.planes)

    @cached_property
    def num_channels(self) -> int:
        """Values that a token has in this chunk: all heads of all its layers."""
        return self.num_elements // self.num_tokens

    @cached_property
    def columns(self) -> dict[Source, slice]:
        """Where each source lies in a row of the chunk's values [token, channel] (values.py)."""
        head_dims = {(plane.layer, plane.kind): plane for plane in self.planes}
        columns, start = {}, 0
        for (layer, kind), plane in sorted(head_dims.items()):
            for head in range(plane.num_heads):
                columns[Source(layer, kind, head)] = slice(start, start + plane.head_dim)
                start += plane.head_dim
        return columns

    @cached_property
    def places(self) -> tuple[tuple[Plane, slice, slice], ...]:
        """Each plane, and its tokens and channels in the chunk's values [token, channel]."""
        placed = []
        for plane in self.planes:
            start = self.columns[Source(plane.layer, plane.kind, 0)].start
            channels = slice(start, start + plane.num_heads * plane.head_dim)
            tokens = slice(plane.first_token, plane.first_token + plane.num_tokens)
            placed.append((plane, tokens, channels))
        return tuple(placed)

    @cached_property
    def digest(self) -> bytes:
        """8 bytes; equal only for equal tensors of a chunk, however their bytes are arranged.

        The arrangement is left out: K and V mean the same in any, so a peer decodes into its own.
        """
        sources = [(source, span.stop - span.start) for source, span in self.columns.items()]
        return xxhash.xxh3_64_digest(repr((self.num_tokens, sources)).encode())


def token_major(
    layers: tuple[int, ...], num_blocks: int, block_tokens: int, num_heads: int, head_dim: int
) -> KVLayout:
    """Pages [token, head, K then V], as GPU backends keep them; per layer ``num_blocks`` pages."""
    page = 2 * block_tokens * num_heads * head_dim
    strides = (2 * head_dim, 2 * num_heads * head_dim, 1)
    return _pages(layers, num_blocks, page, (num_heads, block_tokens, head_dim), {
        "k": (0, strides), "v": (head_dim, strides),
    })  # fmt: skip


def head_major(
    layers: tuple[int, ...], num_blocks: int, block_tokens: int, num_heads: int, head_dim: int
) -> KVLayout:
    """Pages [head, token, K then V], the other layout of GPU backends."""
    page = 2 * block_tokens * num_heads * head_dim
    strides = (2 * head_dim * block_tokens, 2 * head_dim, 1)
    return _pages(layers, num_blocks, page, (num_heads, block_tokens, head_dim), {
        "k": (0, strides), "v": (head_dim, strides),
    })  # fmt: skip


def channel_major_keys(
    layers: tuple[int, ...], num_blocks: int, block_tokens: int, num_heads: int, head_dim: int
) -> KVLayout:
    """Pages of K [head, channel, token] and V [head, token, channel] in turn for each head, as the
    CPU backend keeps them on most machines.
    """
    half = block_tokens * head_dim
    return _pages(layers, num_blocks, 2 * half * num_heads, (num_heads, block_tokens, head_dim), {
        "k": (0, (2 * half, 1, block_tokens)), "v": (half, (2 * half, head_dim, 1)),
    })  # fmt: skip


def matrix_tiles(
    layers: tuple[int, ...], num_blocks: int, block_tokens: int, num_heads: int, head_dim: int
) -> KVLayout:
    """Pages as the CPU backend packs bf16 for matrix tiles (AMX), K and V in turn for each head.

    K is [16 tokens, pair of channels, token, channel], V [16 channels, pair of tokens, channel,
    token].
    """
    half = block_tokens * head_dim
    heads, pair, sixteen = 2 * half, Group(2, 1), Group(16, 2)
    return _pages(layers, num_blocks, heads * num_heads, (num_heads, block_tokens, head_dim), {
        "k": (0, (heads, 16 * head_dim, 32), sixteen, pair),
        "v": (half, (heads, 32, 16 * block_tokens), pair, sixteen),
    })  # fmt: skip


def latent(layers: tuple[int, ...], num_blocks: int, block_tokens: int, size: int) -> KVLayout:
    """Pages [token, latent] of multi-head latent attention."""
    shape = (1, block_tokens, size)
    return _pages(
        layers,
        num_blocks,
        block_tokens * size,
        shape,
        {"latent": (0, (block_tokens * size, size, 1))},
    )


def _pages(
    layers: tuple[int, ...],
    num_blocks: int,
    page: int,
    shape: tuple[int, int, int],
    kinds: dict[Kind, tuple[int, tuple[int, int, int], *tuple[Group, ...]]],
) -> KVLayout:
    """All pages of a layer after each other, layer by layer: vLLM's worker's order."""
    return KVLayout(
        tuple(
            Plane(layer, kind, *shape, (index * num_blocks + block) * page + offset, strides,
                  block * shape[1], *groups)
            for index, layer in enumerate(layers)
            for block in range(num_blocks)
            for kind, (offset, strides, *groups) in kinds.items()
        )
    )  # fmt: skip
