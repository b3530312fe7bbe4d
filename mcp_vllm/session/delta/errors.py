"""What goes wrong with a delta; `decompress_context` raises nothing else, whatever it is fed."""

from mcp_vllm.errors import McpError


class DeltaError(McpError):
    """Root of this package's errors."""


class ArrayError(DeltaError):
    """An array that cannot be part of a context: its type, device, byte order or name."""


class DamagedDeltaError(DeltaError):
    """The delta is malformed, truncated, damaged, oversized or of another version."""


class WrongBaseError(DeltaError):
    """The delta was made for another base; the message names the array that differs."""


class LossNotAcceptedError(DeltaError):
    """The delta was coded by a lossy codec that the receiver did not say it accepts."""
