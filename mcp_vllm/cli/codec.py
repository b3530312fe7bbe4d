"""`mcp-vllm codec`: what the lossy codecs need to know of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcp_vllm.cli.progress import counting

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Calibrate lossy codecs.")


@app.callback()
def codec() -> None:
    """Calibrate lossy codecs."""


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(help="Local folder of a Hugging Face model.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text, once per file; default: text that comes with Python."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Default: the user's cache folder, by the weights.")
    ] = None,
    windows: Annotated[int, typer.Option(min=4, help="Samples of 512 tokens.")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the model.")] = 1,
) -> None:
    """Compute the calibration that `balanced` and `small` need, once per model, on the CPU."""
    import torch

    from mcp_vllm.quality.calibrate import WINDOW_TOKENS, calibrate, library_text
    from mcp_vllm.quality.location import calibration_path
    from mcp_vllm.quality.model import Model, read_texts

    torch.set_num_threads(threads)
    path = output or calibration_path(model)
    # Six characters a token are more than enough of it.
    source = (
        "\n\n".join(read_texts(text).values())
        if text
        else library_text(6 * windows * WINDOW_TOKENS)
    )
    with counting("calibrating") as on_step:
        made = calibrate(Model.load(model), source, windows, on_step)
    made.save(path)
    typer.echo(f"calibration {made}")
    typer.echo(f"written to {path}; every engine that exchanges lossy frames needs this file")
