"""`mcp-vllm demo`: the main job on real engines, with a table, a picture and a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, help="Move a chat between two real engines.")


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Model folder or name; default: Gemma-3-270m, fetched and converted."),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for demo.json, demo.png and the engines' logs.")
    ] = Path("build"),
    max_tokens: Annotated[int, typer.Option(min=1, max=512, help="Answer length, a turn.")] = 32,
) -> None:
    """Chat with engine A, go on at engine B, restart B and go on again; compare with recompute."""
    from mcp_vllm.demo.report import show
    from mcp_vllm.demo.run import run_demo

    result = run_demo(model, output, max_tokens)
    if not show(result, output):
        raise typer.Exit(1)
