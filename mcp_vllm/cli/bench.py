"""`mcp-vllm bench`: measurements on a model, or a trace of requests, of your own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mcp_vllm.cli.progress import counting
from mcp_vllm.errors import McpError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Measure on your own model or trace."
)

_CAPACITIES = ["1%", "3%", "10%", "30%"]
_DEFAULT = ["lossless", "near-lossless", "balanced", "small"]


@app.callback()
def bench() -> None:
    """Measure on your own model or trace."""


@app.command()
def quality(
    model: Annotated[Path, typer.Argument(help="Local folder of a Hugging Face model.")],
    text: Annotated[
        list[Path], typer.Option(help="UTF-8 text to score; once per file, each is a kind of text.")
    ],
    codec: Annotated[
        list[str], typer.Option(metavar="NAME[:STEP]", help="Once per codec to measure.")
    ] = _DEFAULT,
    calibration: Annotated[
        Path | None, typer.Option(help="File of `mcp-vllm codec calibrate`; default: the cached.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    prefix: Annotated[int, typer.Option(min=32, help="Tokens restored through frames.")] = 512,
    continuation: Annotated[int, typer.Option(min=2, help="Tokens scored after them.")] = 128,
    block: Annotated[int, typer.Option(min=1, help="Tokens of a chunk.")] = 16,
    segments: Annotated[int, typer.Option(min=1, help="At most so many of each text.")] = 6,
    greedy: Annotated[int, typer.Option(min=0, help="Tokens of a greedy answer, per text.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the model.")] = 1,
) -> None:
    """What each codec costs the model that continues from a restored prefix, beside its ratio."""
    import torch
    from rich.console import Console

    from mcp_vllm.codec.calibration import Calibration
    from mcp_vllm.quality import location, report, run
    from mcp_vllm.quality.model import Model, read_texts

    if prefix % block:
        raise McpError(f"--prefix {prefix} is no multiple of --block {block}")
    torch.set_num_threads(threads)
    loaded = Calibration.load(calibration) if calibration else location.find_calibration(model)
    contestants = [run.Contestant.parse(label, loaded) for label in codec]
    setting = run.Setting(prefix, continuation + 1, block, segments, greedy)
    texts = read_texts(text)
    with counting("measuring") as on_step:
        measured = run.run(Model.load(model), texts, contestants, loaded, setting, on_step)
    made = report.as_json(measured, contestants, loaded, setting, model.name)
    Console().print(report.table(made))
    if json_file:
        json_file.write_text(json.dumps(made, indent=1), encoding="utf-8")


@app.command()
def cache(
    trace: Annotated[
        Path, typer.Option(help="Requests, one JSON object a line: docs/smart-cache.md.")
    ],
    capacity: Annotated[
        list[str], typer.Option(metavar="BLOCKS|SHARE%", help="Once per capacity.")
    ] = _CAPACITIES,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="SmartCache without each of its tables, too.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw hit rate over capacity here.")] = None,
    prefill_rate: Annotated[
        float, typer.Option(min=1, help="Tokens a second of a prefill's start, for time saved.")
    ] = 5000.0,
) -> None:
    """Replay a trace: SmartCache beside LRU, LFU, ARC, S3-FIFO, W-TinyLFU and the optimum."""
    from rich.console import Console

    from mcp_vllm.cache_bench import replay, report
    from mcp_vllm.cache_bench import trace as traces

    read = traces.read(trace)
    capacities = sorted({_blocks(each, read.num_blocks) for each in capacity})
    with counting("replaying") as on_step:
        scores = replay.replay(
            read,
            capacities,
            replay.policies(ablate),
            replay.PrefillModel(tokens_per_s=prefill_rate),
            on_step,
        )
    console = Console()
    console.print(report.table(scores, read))
    for blocks, share in report.closed(scores).items():
        console.print(f"{blocks} blocks: {share:.1%} of the way from the best classic to Belady")
    if json_file:
        json_file.write_text(json.dumps(report.as_json(scores, read), indent=1), encoding="utf-8")
    if png:
        report.draw(scores, read, png)


def _blocks(capacity: str, num_blocks: int) -> int:
    """A capacity in blocks, from a number or a share of the distinct blocks."""
    try:
        if capacity.endswith("%"):
            return max(1, int(float(capacity[:-1]) / 100 * num_blocks))
        return max(1, int(capacity))
    except ValueError:
        raise McpError(
            f"--capacity {capacity} is neither a number nor a share such as 3%"
        ) from None
