"""`mcp-vllm stage`: the middle layers of a model, for engines that run with `--mcp-split`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from mcp_vllm.config.address import Address
from mcp_vllm.config.split import StageConfig
from mcp_vllm.vllm_plugin.shared_cores import share_cores

app = typer.Typer(add_completion=False, help="Run some layers of a model for engines elsewhere.")


@app.command()
def stage(
    model: Annotated[str, typer.Argument(help="The engines' model: folder, or name on the Hub.")],
    vllm_args: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- VLLM_FLAGS]", help="Flags of vLLM, as the engines have them."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="FIRST:END|auto", help="4:14 is layers 4 to 13; auto: all that fit."),
    ] = None,
    memory_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With --layers auto: for weights and KV blocks; 70 % of the free memory if not "
            "given.",
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="For engines; 127.0.0.1:7090 if not given."),
    ] = None,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="For /healthz and /metrics.")
    ] = None,
    kv_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory for KV blocks of all engines; 4GiB if not given."
        ),
    ] = None,
    leases: Annotated[
        int | None, typer.Option(help="Engines at once (1 if not given); each gets a part.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", metavar="FILE|JSON", help="Settings, security among them."),
    ] = None,
) -> None:
    """Load layers FIRST to END-1 of MODEL, and nothing else of it, and run them for engines."""
    flags = {
        "layers": layers,
        "memory_bytes": memory_bytes,
        "listen": listen,
        "http": http,
        "kv_bytes": kv_bytes,
        "leases": leases,
    }
    settings = StageConfig.load(config, flags)
    if Address.parse(settings.listen).is_loopback:
        share_cores(os.environ)
    from mcp_vllm.split.engine.stage import serve_stage
    from mcp_vllm.telemetry.logs import configure_logging

    configure_logging("mcp-stage")
    serve_stage(model, settings, vllm_args or [])
