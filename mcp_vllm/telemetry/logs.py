"""Logging of our own processes: one line a record, on standard error."""

from __future__ import annotations

import logging
import os


def configure_logging(program: str = "mcp-agent") -> None:
    """Set up the root logger, whose records name `program`; the level is INFO unless
    MCP_VLLM_LOG_LEVEL says otherwise."""
    logging.basicConfig(
        level=os.environ.get("MCP_VLLM_LOG_LEVEL", "INFO").upper(),
        format=f"%(asctime)s %(levelname)s {program}[%(process)d] %(message)s",
    )
