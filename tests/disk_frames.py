"""Frames for tests of the disk tier: any chunk's bytes follow from its number and version."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mcp_vllm.codec import ChunkLayout
from mcp_vllm.codec.loss import EXACT
from mcp_vllm.store.disk import StoredFrame
from mcp_vllm.store.ram import ChunkKey

LAYOUT = ChunkLayout("bf16", 64)


def name_of(number: int, tenant: str = "default") -> ChunkKey:
    return ChunkKey(b"n" * 32, number.to_bytes(36, "big"), tenant)


def frame_of(number: int, size: int, loss: str = EXACT) -> bytes:
    """Bytes that no other number, size or loss gives."""
    seed = hashlib.sha256(f"{number}/{size}/{loss}".encode()).digest()
    return (seed * (size // len(seed) + 1))[:size]


def stored(
    number: int, size: int = 1000, loss: str = EXACT, tenant: str = "default"
) -> StoredFrame:
    frame = frame_of(number, size, loss)
    return StoredFrame(name_of(number, tenant), frame, LAYOUT, 2 * size, loss)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
