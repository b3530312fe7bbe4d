"""Replays a request trace against eviction policies; what `mcp-vllm bench cache` runs.

Nothing of the serving path imports this package.
"""
