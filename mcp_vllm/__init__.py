"""mcp_vllm: sessions that follow the user between vLLM engines.

MCP stands for *model context protocol* / *mixed computing protocol* here, not for the tool-calling
protocol of the same initials.
"""

__version__ = "0.1.0"
