"""`mcp-vllm doctor`: what would stop it from working here, and how to mend it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mcp_vllm.config import Config, ConfigError
from mcp_vllm.doctor.check import Check, Status, any_failed, fail, report

app = typer.Typer(add_completion=False, help="Say what would stop it from working here.")

COLOURS = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red"}


@app.command()
def doctor(
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", metavar="FILE|JSON", help="Settings; the engines' file."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Local folder of the model: identify its weights, too.")
    ] = None,
    hash_algorithm: Annotated[
        str | None,
        typer.Option(
            "--prefix-caching-hash-algo",
            metavar="NAME",
            help="As given to `vllm serve`; default: vLLM's.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check vLLM, block hashes, the agent, memory, peers and weights; exit with 1 on a fail."""
    with Console(stderr=True).status("asking vLLM (half a minute on an idle machine)"):
        checks = run_checks(config, model, hash_algorithm)
    if as_json:
        typer.echo(json.dumps(report(checks), indent=2))
    else:
        Console().print(_table(checks))
    if any_failed(checks):
        raise typer.Exit(1)


def run_checks(
    config_source: str | None, model: Path | None, hash_algorithm: str | None
) -> list[Check]:
    """All checks, in the order in which their faults are best mended."""
    from mcp_vllm.doctor import agent_start, engine, memory, peers, probe, weights

    version = engine.check_version()
    checks = [version, engine.check_metadata_name(), engine.check_plugin(os.environ)]
    if version.status is Status.OK:
        probes = probe.run_probes(hash_algorithm)
    else:
        probes = [probe.Probe(fault=version.found)]
    checks += [probe.check_platform(probes[0]), probe.check_block_hash(probes, os.environ)]
    try:
        config = Config.load(config_source)
    except ConfigError as error:
        checks.append(fail("configuration", str(error), "mcp-vllm config check FILE"))
    else:
        checks += [
            agent_start.check_listen(config),
            agent_start.check_socket(config),
            agent_start.check_codec(config),
            memory.check_shared_memory(config),
            memory.check_ram(config),
            *peers.check_peers(config),
        ]
    if model is not None:
        checks.append(weights.check_weights(model))
    return checks


def _table(checks: list[Check]) -> Table:
    table = Table(show_lines=False)
    for title in ("", "check", "found", "to mend it"):
        table.add_column(title, overflow="fold")
    for check in checks:
        colour = COLOURS[check.status]
        table.add_row(
            f"[{colour}]{check.status}[/]",
            escape(check.name),
            escape(check.found),
            escape(check.remedy),
        )
    return table
