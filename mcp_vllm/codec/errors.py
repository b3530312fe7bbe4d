"""What goes wrong with a codec or a frame; a decoder raises nothing else, whatever it is fed."""

from mcp_vllm.errors import McpError


class CodecError(McpError):
    """Root of this package's errors; raised itself for a request no codec can serve."""


class FrameError(CodecError):
    """The frame is malformed, truncated, oversized, of another version, or of another key."""


class ChecksumError(CodecError):
    """The frame parses, but its header or its decoded bytes do not match their checksum."""
