"""Contexts as named arrays, and the deltas between them: pure functions over bytes.

A delta is one self-describing, versioned, checksummed byte string. Made by the holder of a context
that grew, applied by the holder of the context it grew from. docs/deltas.md has the guarantees.
"""

from mcp_vllm.session.delta.compress import compress_context
from mcp_vllm.session.delta.decompress import DEFAULT_MAX_BYTES, decompress_context
from mcp_vllm.session.delta.errors import (
    ArrayError,
    DamagedDeltaError,
    DeltaError,
    LossNotAcceptedError,
    WrongBaseError,
)

__all__ = [
    "DEFAULT_MAX_BYTES",
    "ArrayError",
    "DamagedDeltaError",
    "DeltaError",
    "LossNotAcceptedError",
    "WrongBaseError",
    "compress_context",
    "decompress_context",
]
