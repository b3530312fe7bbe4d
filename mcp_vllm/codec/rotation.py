"""Rotary position embedding taken off K and put back: pair (i, i + n) of a head, n pairs.

Functions of numpy arrays or torch tensors alike: what would run on an accelerator is
what is tested on the CPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mcp_vllm.codec.kernel import Float32s


def angles(frequencies: Float32s, first_token: int, num_tokens: int) -> tuple[Any, Any]:
    """Cosines and sines, float32 [token, pair]."""
    positions = np.arange(first_token, first_token + num_tokens, dtype=np.float64)
    of_pair = positions[:, None] * frequencies.astype(np.float64)[None, :]
    return np.cos(of_pair).astype(np.float32), np.sin(of_pair).astype(np.float32)


def rotate(head: Any, cosines: Any, sines: Any) -> None:
    """Turn the first pairs of ``head`` [token, channel] by these angles, in place."""
    num_pairs = cosines.shape[1]
    first, second = head[:, :num_pairs], head[:, num_pairs : 2 * num_pairs]
    turned = first * cosines - second * sines
    second[...] = second * cosines + first * sines
    first[...] = turned
