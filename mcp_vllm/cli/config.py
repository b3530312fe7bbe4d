"""`mcp-vllm config`: what a configuration file amounts to, and where each value comes from."""

import os
from pathlib import Path
from typing import Annotated

import typer

from mcp_vllm.config import Config, loader
from mcp_vllm.config.render import render

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Check a configuration file, show the settings.",
)


@app.command()
def check(file: Annotated[Path, typer.Argument(help="YAML or JSON file.")]) -> None:
    """Print the settings that FILE leads to here, or say what is wrong with it and exit with 1."""
    loaded = loader.load(Config, file, flags={}, environ=os.environ)
    typer.echo(f"# {file} is good. It leads to:")
    typer.echo(render(loaded))


@app.command()
def show() -> None:
    """Print the settings without a file: the defaults and what the environment changes in them."""
    typer.echo(render(loader.load(Config, None, flags={}, environ=os.environ)))
