"""Where this user's caches go: the demo's model, digests of weights."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """$MCP_VLLM_CACHE, else $XDG_CACHE_HOME/mcp_vllm, else ~/.cache/mcp_vllm."""
    if own := os.environ.get("MCP_VLLM_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mcp_vllm"
