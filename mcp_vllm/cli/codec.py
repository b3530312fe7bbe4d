"""`mcp-vllm codec`: what the lossy codecs need to know of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mcp_vllm.cli.progress import counting

if TYPE_CHECKING:
    import torch

    from mcp_vllm.quality.model import Model

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Calibrate lossy codecs.")


@app.callback()
def codec() -> None:
    """Calibrate lossy codecs."""


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(help="Local folder of a Hugging Face model.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text, once per file; default: half of it comes with Python, half the model"
            " writes itself."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Default: the user's cache folder, by the weights.")
    ] = None,
    windows: Annotated[int, typer.Option(min=4, help="Samples of 512 tokens.")] = 128,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the model.")] = 1,
) -> None:
    """Compute the calibration that `balanced` and `small` need, once per model, on the CPU."""
    import torch

    from mcp_vllm.quality.calibrate import calibrate, windows_of_text
    from mcp_vllm.quality.location import calibration_path
    from mcp_vllm.quality.model import Model, read_texts

    torch.set_num_threads(threads)
    path = output or calibration_path(model)
    loaded = Model.load(model)
    if text:
        spans = windows_of_text(loaded, "\n\n".join(read_texts(text).values()), windows)
    else:
        spans = _default_windows(loaded, windows)
    with counting("calibrating") as on_step:
        made = calibrate(loaded, spans, on_step)
    made.save(path)
    typer.echo(f"calibration {made}")
    typer.echo(f"written to {path}; every engine that exchanges lossy frames needs this file")


def _default_windows(model: Model, num_windows: int) -> list[torch.Tensor]:
    from mcp_vllm.quality.calibrate import WINDOW_TOKENS, library_text, windows_of_text
    from mcp_vllm.quality.own_text import own_tokens

    num_own = num_windows // 2
    num_library = num_windows - num_own
    # Six characters a token are more than enough of it.
    spans = windows_of_text(model, library_text(6 * num_library * WINDOW_TOKENS), num_library)
    with counting("the model writes") as on_step:
        return spans + own_tokens(model, num_own, WINDOW_TOKENS - 1, on_step)
