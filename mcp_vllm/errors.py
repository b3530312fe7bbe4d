"""The root of every error that mcp_vllm raises on purpose.

Each message names what is at fault (key, peer, session, file, setting) and what to do next.
"""


class McpError(Exception):
    """Root of the package's errors; catch this to catch them all."""
