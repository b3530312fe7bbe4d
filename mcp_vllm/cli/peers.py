"""`mcp-vllm peers`: how this host's agent sees its peers, and which codec suits which link."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mcp_vllm.agent.peer_report import PeerReport, PeersReport
from mcp_vllm.config import Address, Config
from mcp_vllm.errors import McpError

app = typer.Typer(add_completion=False, help="Show the peers as this host's agent sees them.")

DEADLINE_S = 5.0
MAX_BYTES = 16 << 20


class AgentUnreachable(McpError):
    """The agent did not answer as an agent does."""


@app.command()
def peers(
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", metavar="FILE|JSON", help="Settings; the engines' file."),
    ] = None,
    agent: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="The agent to ask; default: agent.listen."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Ask the agent for its peers: up or not, the link as measured, the codec, the break-evens."""
    address = agent or Config.load(config).agent.listen
    try:
        name = str(Address.parse(address))
    except ValueError as error:
        raise AgentUnreachable(f"--agent: {error}") from error
    body = _get(f"http://{name}/v1/peers", name)
    report = _decoded(body, name)
    if as_json:
        typer.echo(body.decode())
    else:
        Console().print(_table(report.peers) if report.peers else f"agent {name} has no peers")


def _get(url: str, name: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as response:
            body: bytes = response.read(MAX_BYTES)
            return body
    except (urllib.error.URLError, OSError) as error:
        raise AgentUnreachable(
            f"no agent answers at {name} ({error}): start one, or name it with --agent"
        ) from error


def _decoded(body: bytes, name: str) -> PeersReport:
    try:
        return msgspec.json.decode(body, type=PeersReport)
    except msgspec.MsgspecError as error:
        raise AgentUnreachable(f"{name} does not answer as an agent does: {error}") from error


def _table(reports: list[PeerReport]) -> Table:
    table = Table()
    for title in ("peer", "state", "latency ms", "MB/s", "codec", "fastest codec by link"):
        table.add_column(title, overflow="fold")
    for peer in reports:
        table.add_row(
            escape(peer.name),
            "[green]up[/]" if peer.up else "[red]avoided[/]",
            _figure(peer.latency_ms),
            _figure(peer.mb_s),
            peer.codec or "as stored there",
            _break_evens(peer),
        )
    return table


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.1f}"


def _break_evens(peer: PeerReport) -> str:
    if not peer.break_evens:
        return peer.codec or "not known yet"
    parts = [f"{each.below} below {each.mb_s:,.1f} MB/s" for each in peer.break_evens]
    return ", ".join([*parts, f"then {peer.break_evens[-1].above}"])
