"""What the configuration raises: one error, one line for each fault found."""

from collections.abc import Sequence

from mcp_vllm.errors import McpError


class ConfigError(McpError):
    """The configuration cannot be used.

    `faults` holds one line each: where it was read, the dotted key, and what is wrong with it.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        # A key out of a file may hold a line break; its fault is still one line.
        self.faults = tuple(r"\n".join(fault.splitlines()) for fault in faults)
        super().__init__("\n".join(self.faults))
