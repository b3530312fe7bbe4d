"""What the security settings raise when they cannot be used."""

from mcp_vllm.errors import McpError


class SecurityError(McpError):
    """A certificate, key or token file cannot be used; names the file, never what is in it."""
