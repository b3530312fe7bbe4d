"""`mcp-vllm agent`: a context agent that runs on its own and outlives the engines of its host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcp_vllm.config import Config, ConfigError

app = typer.Typer(add_completion=False, help="Run a context agent on its own.")


@app.command()
def agent(
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", metavar="FILE|JSON", help="Settings; the engines' file."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option("--mcp-peer", metavar="HOST:PORT", help="Another host's agent; repeatable."),
    ] = None,
) -> None:
    """Serve this host's engines at `agent.socket` and other hosts' agents at `agent.listen`."""
    from mcp_vllm.agent.process import serve
    from mcp_vllm.telemetry.logs import configure_logging

    settings = Config.load(config, peers=tuple(peer or ()))
    if settings.agent.socket is None:
        raise ConfigError(
            ["agent.socket: an agent that runs on its own needs the path of its Unix socket"]
        )
    configure_logging()
    serve(settings, Path(settings.agent.socket), owned=False)
