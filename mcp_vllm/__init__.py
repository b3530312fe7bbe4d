"""mcp_vllm: sessions that follow the user between vLLM engines.

MCP stands for *model context protocol* / *mixed computing protocol* here, not for the tool-calling
protocol of the same initials.
"""

__version__ = "0.1.0"

_CLIENTS = ("AsyncMCPClient", "MCPClient")
__all__ = [*_CLIENTS, "__version__"]


def __getattr__(name: str) -> object:
    """The clients, imported only where they are used: an engine needs neither them nor httpx."""
    if name in _CLIENTS:
        from mcp_vllm import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
