"""`mcp-vllm peers`: how this host's agent sees its peers, and which codec suits which link."""

from __future__ import annotations

from typing import Annotated

import httpx
import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mcp_vllm.agent.peer_report import PeerReport, PeersReport
from mcp_vllm.cli import credentials
from mcp_vllm.cli.credentials import CaFile, CertificateFile, Credentials, KeyFile, TokenFile
from mcp_vllm.config import Address, Config
from mcp_vllm.errors import McpError

app = typer.Typer(add_completion=False, help="Show the peers as this host's agent sees them.")

DEADLINE_S = 5.0


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
    token_file: TokenFile = None,
    ca: CaFile = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
) -> None:
    """Ask the agent for its peers: up or not, the link as measured, the codec, the break-evens,
    and whether loading from them paid.

    Where none are given, the certificate and the token are those of the settings.
    """
    settings = Config.load(config)
    address = agent or settings.agent.listen
    try:
        name = str(Address.parse(address))
    except ValueError as error:
        raise AgentUnreachable(f"--agent: {error}") from error
    security = settings.security
    using = credentials.given(
        token_file or security.own_token_file,
        ca or security.tls.ca,
        cert or security.tls.certificate,
        key or security.tls.key,
    )
    body = _get(using, name)
    report = _decoded(body, name)
    if as_json:
        typer.echo(body.decode())
    else:
        console = Console()
        console.print(_table(report.peers) if report.peers else f"agent {name} has no peers")
        console.print(_loads_table(report))
        speed = report.prefill_tokens_s
        computed = "not measured" if speed is None else f"{speed:,.0f} tokens a second"
        console.print(f"the engine computes a prompt at: {computed}")


def _get(using: Credentials, name: str) -> bytes:
    headers = {"Authorization": f"Bearer {using.token}"} if using.token else {}
    try:
        response = httpx.get(
            f"{using.url(name)}/v1/peers",
            headers=headers,
            timeout=DEADLINE_S,
            verify=using.tls or True,
        )
    except httpx.HTTPError as error:
        raise AgentUnreachable(
            f"no agent answers at {name} ({error}): start one, or name it with --agent"
        ) from error
    if response.is_error:
        raise AgentUnreachable(f"agent {name} says {response.status_code}: {response.text[:500]}")
    return response.content


def _decoded(body: bytes, name: str) -> PeersReport:
    try:
        return msgspec.json.decode(body, type=PeersReport)
    except msgspec.MsgspecError as error:
        raise AgentUnreachable(f"{name} does not answer as an agent does: {error}") from error


def _table(reports: list[PeerReport]) -> Table:
    table = Table()
    for title in (
        "peer",
        "state",
        "directory",
        "latency ms",
        "MB/s",
        "codec",
        "fastest codec by link",
    ):
        table.add_column(title, overflow="fold")
    for peer in reports:
        table.add_row(
            escape(peer.name),
            "[green]up[/]" if peer.up else "[red]avoided[/]",
            f"{peer.directory}, {peer.chunks:,} chunks" if peer.chunks else peer.directory,
            _figure(peer.latency_ms),
            _figure(peer.mb_s),
            peer.codec or "as stored there",
            _break_evens(peer),
        )
    return table


def _loads_table(report: PeersReport) -> Table:
    table = Table(title="Contexts found")
    titles = ("at", "loaded", "in part", "computed", "given up", "predicted/actual", "saved s")
    for title in titles:
        table.add_column(title, overflow="fold")
    rows = [(peer.name, peer.loads) for peer in report.peers]
    for name, loads in [*rows, ("own store", report.store)]:
        accuracy = loads.predicted_actual
        table.add_row(
            escape(name),
            str(loads.loaded),
            str(loads.partial),
            str(loads.recomputed),
            str(loads.given_up),
            "not measured" if accuracy is None else f"{accuracy:.2f}",
            f"{loads.saved_s:,.1f}",
        )
    return table


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.1f}"


def _break_evens(peer: PeerReport) -> str:
    if not peer.break_evens:
        return peer.codec or "not known yet"
    parts = [f"{each.below} below {each.mb_s:,.1f} MB/s" for each in peer.break_evens]
    return ", ".join([*parts, f"then {peer.break_evens[-1].above}"])
