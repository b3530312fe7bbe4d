"""`mcp-vllm plan`: where to split a model between this machine and a stage, and whether it pays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mcp_vllm.errors import McpError

app = typer.Typer(add_completion=False, help="Where to split a model, and whether it pays.")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face model, or its name.")],
    local: Annotated[
        str, typer.Option(metavar="measure|FILE", help="This machine: measure it, or its figures.")
    ] = "measure",
    cloud: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT|FILE", help="A running stage, or a machine's figures."),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(metavar="RTT,BANDWIDTH", help="As in 20ms,100Mbit. [default: measured]"),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Requests that generate at once.")] = 1,
    budget: Annotated[
        int, typer.Option(min=16, help="Tokens a step: vLLM's --max-num-batched-tokens.")
    ] = 2048,
    form: Annotated[
        str,
        typer.Option(
            metavar="raw|packed|fold|fp8|auto",
            help="Activations on the wire; auto: the exactest that the link does not make slow.",
        ),
    ] = "raw",
    dtype: Annotated[str | None, typer.Option(help="[default: the model's]")] = None,
    local_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="As in 8GiB. [default: what is free]")
    ] = None,
    cloud_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="[default: what the stage says]")
    ] = None,
    max_step_ms: Annotated[
        float | None,
        typer.Option(min=0.1, help="Say which --max-num-batched-tokens keeps steps below this."),
    ] = None,
    security: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|JSON", help="Keys tls, token_file, insecure of --mcp-split, for --cloud."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Splits to show.")] = 10,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the best split for --mcp-split.")
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="Stages of that file. [default: --cloud]"),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw all splits (.png, .svg).")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Only measure this machine, for --output.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where --measure writes.")
    ] = None,
) -> None:
    """Print the splits of MODEL with predicted times and memory, and which is best."""
    from rich.console import Console

    from mcp_vllm.split.plan.cost import Load

    errors = Console(stderr=True)
    load = Load(prompt, answer, batch, budget)
    if measure:
        if output is None:
            raise McpError("--measure: give --output FILE for the figures")
        with errors.status("measuring this machine: about a minute"):
            _measure(model, dtype, load, _bytes(local_memory, "--local-memory"), output)
        errors.print(f"figures of this machine: {output}")
        return
    if cloud is None:
        raise McpError("--cloud: give HOST:PORT of a running stage, or a file of figures")
    from mcp_vllm.split.plan import report
    from mcp_vllm.split.plan.partitioner import TaskPartitioner

    settings = _security(security)
    with errors.status("measuring: about a minute for each machine that has no file of figures"):
        made = TaskPartitioner(
            model,
            {"local": local, "cloud": _place(cloud)},
            load=load,
            link=_link(link),
            form=_form(form),
            dtype=dtype,
            local_bytes=_bytes(local_memory, "--local-memory"),
            cloud_bytes=_bytes(cloud_memory, "--cloud-memory"),
            security=settings,
        ).plan()
    if json_output:
        typer.echo(json.dumps(report.as_json(made), indent=1))
    else:
        console = Console()
        console.print(report.table(made, rows))
        for sentence in (report.verdict(made), *made.notes):
            console.print(sentence, highlight=False)
        if max_step_ms is not None:
            console.print(report.budget_line(made, max_step_ms), highlight=False)
    if picture is not None:
        report.picture(made, picture)
    if write is not None:
        if max_step_ms is not None:
            settings = {**settings, "batch_tokens": made.batch_tokens(max_step_ms / 1e3)}
        made.write_split_config(write, stage or [], **settings)


def _measure(model: str, dtype: str | None, load: Any, memory: int | None, path: Path) -> None:
    from mcp_vllm.split.plan.figures import write_figures
    from mcp_vllm.split.plan.measure import measure_here
    from mcp_vllm.split.plan.read import read_model
    from mcp_vllm.split.plan.request import MeasureRequest

    shape = read_model(model, dtype)
    request = MeasureRequest.of(model, shape.dtype, shape.num_layers, load, memory)
    write_figures(path, measure_here(request))


def _place(cloud: str) -> str:
    """A file if there is one of that name, else a stage."""
    from mcp_vllm.config.address import Address
    from mcp_vllm.split.plan.partitioner import SCHEME

    if cloud.startswith(SCHEME) or Path(cloud).exists():
        return cloud
    try:
        return f"{SCHEME}{Address.parse(cloud)}"
    except ValueError as error:
        raise McpError(f"--cloud: no such file, and {error}") from None


def _link(text: str | None) -> Any:
    from mcp_vllm.split.plan.link_text import parse_link

    try:
        return None if text is None else parse_link(text)
    except ValueError as error:
        raise McpError(f"--link: {error}") from None


def _form(form: str) -> str:
    from mcp_vllm.split.activations import FORMS
    from mcp_vllm.split.plan.partitioner import AUTO

    if form not in (*FORMS, AUTO):
        raise McpError(f"--form: {form!r} is none of {', '.join((*FORMS, AUTO))}")
    return form


def _bytes(size: str | None, flag: str) -> int | None:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return None if size is None else int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        raise McpError(f"{flag}: {size!r} is not a size, as 8GiB or 512MiB are") from None


def _security(source: str | None) -> dict[str, Any]:
    from mcp_vllm.config.source import read_source

    _, tree = read_source(source)
    unknown = set(tree) - {"tls", "token_file", "insecure"}
    if unknown:
        raise McpError(f"--security: {sorted(unknown)[0]!r} is none of tls, token_file, insecure")
    return dict(tree)
