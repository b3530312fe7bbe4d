"""mcp_vllm: sessions that follow the user between vLLM engines.

MCP stands for *model context protocol* / *mixed computing protocol* here, not for the tool-calling
protocol of the same initials.
"""

__version__ = "0.1.0"

_CLIENTS = ("AsyncMCPClient", "MCPClient")
__all__ = [*_CLIENTS, "TaskPartitioner", "__version__"]


def __getattr__(name: str) -> object:
    """What is public, imported only where it is used: an engine needs neither it nor httpx."""
    if name in _CLIENTS:
        from mcp_vllm import client

        return getattr(client, name)
    if name == "TaskPartitioner":
        from mcp_vllm.split.plan.partitioner import TaskPartitioner

        return TaskPartitioner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
