"""Layers of this engine's model that another process holds, KV included (`--mcp-split`).

A host chunk has the KV of all layers: that of these lies behind the engine's own, a slot of
``blocks_per_chunk`` pages for each layer of a group. The split's executor announces them before
vLLM makes the connector's two sides, which are in the same process and thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Pages = NDArray[np.uint8]


class RemotePages(Protocol):
    """The KV blocks of layers elsewhere."""

    def read(self, layers: Sequence[str], blocks: Sequence[int]) -> Pages:
        """uint8 [layer, block, byte]."""

    def write(self, layers: Sequence[str], blocks: Sequence[int], pages: Pages) -> None:
        """The inverse of read."""


@dataclass(frozen=True)
class RemoteLayers:
    """
    Attributes:
        groups: layer names by KV cache group, in the order of their slots.
        page_bytes: of a block of one layer, the same for all.
        pages: where they are.
    """

    groups: tuple[tuple[str, ...], ...]
    page_bytes: int
    pages: RemotePages

    @property
    def num_slots(self) -> int:
        """Groups use the same ones: a chunk belongs to one group."""
        return max(map(len, self.groups))

    @property
    def block_bytes(self) -> int:
        """What they add to a host chunk for each of its blocks."""
        return self.num_slots * self.page_bytes


_announced: RemoteLayers | None = None


def announce(layers: RemoteLayers | None) -> None:
    """Of the engine that this process is about to start; None: all layers are its own."""
    global _announced
    _announced = layers


def announced() -> RemoteLayers | None:
    return _announced
