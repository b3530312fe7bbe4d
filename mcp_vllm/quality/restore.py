"""K and V of a context through real frames: cut into chunks, encoded, decoded, put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mcp_vllm.codec import ChunkLayout, Codec, KVLayout, Plane, decode_frame_into, encode_frame
from mcp_vllm.codec.calibration import Calibration
from mcp_vllm.quality.model import Tensors


@dataclass(frozen=True)
class Restored:
    """What came out of the frames, and what went over the wire for it.

    ``num_first_raw_bytes`` and ``num_first_frame_bytes`` are the share of the context's first
    chunk, which holds the exact tokens.
    """

    tensors: Tensors
    num_raw_bytes: int
    num_frame_bytes: int
    num_first_raw_bytes: int
    num_first_frame_bytes: int


def restore(
    tensors: Tensors, num_block_tokens: int, codec: Codec, calibration: Calibration | None
) -> Restored:
    """All layers' K and V [head, token, channel] as bf16 chunks of so many tokens, and back.

    A chunk is what vLLM hands over of a model with one KV cache group; tokens past the last whole
    block are left as they are.
    """
    kv = _layout(tensors, num_block_tokens)
    restored = [(keys.clone(), values.clone()) for keys, values in tensors]
    raw_sizes, frame_sizes = [], []
    for position in range(tensors[0][0].shape[1] // num_block_tokens):
        span = slice(position * num_block_tokens, (position + 1) * num_block_tokens)
        chunk = _pack([(keys[:, span], values[:, span]) for keys, values in tensors])
        layout = ChunkLayout("bf16", tensors[0][0].shape[2], kv, position)
        key = position.to_bytes(36, "big")  # As long as vLLM's.
        frame = encode_frame(key, chunk, layout, codec)
        out = bytearray(len(chunk))
        decode_frame_into(frame, memoryview(out), key=key, kv=kv, calibration=calibration)
        _unpack(out, [(keys[:, span], values[:, span]) for keys, values in restored])
        raw_sizes.append(len(chunk))
        frame_sizes.append(len(frame))
    return Restored(restored, sum(raw_sizes), sum(frame_sizes), raw_sizes[0], frame_sizes[0])


def _layout(tensors: Tensors, num_tokens: int) -> KVLayout:
    """K [head, token, channel], then V, of each layer in turn."""
    planes, offset = [], 0
    for layer, pair in enumerate(tensors):
        for kind, tensor in zip(("k", "v"), pair, strict=True):
            num_heads, _, head_dim = tensor.shape
            strides = (num_tokens * head_dim, head_dim, 1)
            planes.append(
                Plane(layer, kind, num_heads, num_tokens, head_dim, offset, strides)  # type: ignore[arg-type]
            )
            offset += num_heads * num_tokens * head_dim
    return KVLayout(tuple(planes))


def _pack(tensors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bytes:
    flat = [tensor.to(torch.bfloat16).reshape(-1) for pair in tensors for tensor in pair]
    return torch.cat(flat).view(torch.int16).numpy().tobytes()


def _unpack(chunk: bytearray, tensors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    flat = torch.frombuffer(chunk, dtype=torch.bfloat16)
    targets = [tensor for pair in tensors for tensor in pair]
    for target, part in zip(targets, flat.split([t.numel() for t in targets]), strict=True):
        target.copy_(part.view(target.shape))
