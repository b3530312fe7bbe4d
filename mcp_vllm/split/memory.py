"""Running out of memory: how it looks, and asking for less."""

from __future__ import annotations

import torch

from mcp_vllm.split.spans import SHARE

_LEAST_BYTES = 1 << 20


def is_out_of_memory(error: BaseException) -> bool:
    """Of the host, or of a device; torch has no type of its own for the host's, and two texts."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def allocatable(num_bytes: int, device: torch.device) -> int:
    """What can be allocated at once: `num_bytes`, or less, by SHARE again and again.

    Raises MemoryError: hardly anything.
    """
    while num_bytes >= _LEAST_BYTES:
        try:
            torch.empty(num_bytes, dtype=torch.uint8, device=device)
            return num_bytes
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        num_bytes = int(num_bytes * SHARE)
    raise MemoryError(f"less than {_LEAST_BYTES} bytes can be allocated")
