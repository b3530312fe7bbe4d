"""What a session operation that cannot be done raises."""

from mcp_vllm.errors import McpError

NOTHING_HERE = "none of the session's chunks are here"


class SessionError(McpError):
    """An operation that cannot be done; `status` is the HTTP status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
