"""`python -m mcp_vllm.agent`: how an engine starts the agent that belongs to it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mcp_vllm.agent.process import serve
from mcp_vllm.config import Config
from mcp_vllm.errors import McpError
from mcp_vllm.telemetry.logs import configure_logging


def main() -> int:
    parser = argparse.ArgumentParser(prog="mcp_vllm.agent")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--owned", action="store_true")
    args = parser.parse_args()
    configure_logging()
    try:
        config = Config.from_json(os.environ["MCP_VLLM_CONFIG_JSON"])
        serve(config, args.socket, owned=args.owned)
    except McpError as error:
        sys.stderr.write(f"mcp-vllm agent: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
