"""Which layers a place holds: runs of middle layers, and how they shrink.

A span is (first, end): the layers first to end - 1. The first and the last layer of a model are in
no span.
"""

from __future__ import annotations

from collections.abc import Sequence

from mcp_vllm.split.errors import SplitError

Span = tuple[int, int]
# What is left of a share that memory did not suffice for.
SHARE = 0.8


def text(span: Span) -> str:
    return f"{span[0]}:{span[1]}"


def within(span: Span, outer: Span) -> bool:
    return outer[0] <= span[0] < span[1] <= outer[1]


def smaller(span: Span) -> Span | None:
    """SHARE of the layers, in the middle of `span`, and at least one less; None: none would be."""
    length = span[1] - span[0]
    fewer = min(int(length * SHARE), length - 1)
    if fewer < 1:
        return None
    first = span[0] + (length - fewer) // 2
    return first, first + fewer


def fitting(layer_bytes: Sequence[int], memory_bytes: int) -> Span:
    """The longest span whose weights fit into the memory, the one nearest to the model's middle.

    Args:
        layer_bytes: of each layer of the model.

    Raises:
        SplitError: not even one layer fits.
    """
    num_layers = len(layer_bytes)
    fit = [
        (first, end)
        for first in range(1, num_layers - 1)
        for end in range(first + 1, num_layers)
        if sum(layer_bytes[first:end]) <= memory_bytes
    ]
    if not fit:
        raise SplitError(
            f"no layer fits: {max(0, memory_bytes)} bytes are left for weights, the smallest layer "
            f"has {min(layer_bytes)}"
        )
    return max(fit, key=lambda span: (span[1] - span[0], -abs(span[0] + span[1] - num_layers)))
