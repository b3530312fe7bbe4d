"""`mcp-vllm sessions`: what can be done with the sessions of one agent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from mcp_vllm.cli import credentials
from mcp_vllm.cli.credentials import CaFile, CertificateFile, Credentials, KeyFile, TokenFile
from mcp_vllm.cli.duration import seconds_of
from mcp_vllm.client import DEFAULT_URL, ApiError, MCPClient
from mcp_vllm.session.api import SessionSummary, Transfer
from mcp_vllm.session.manifest import DEFAULT_TENANT

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="List, move, fork, pin, park, export sessions."
)
console = Console()

SessionId = Annotated[str, typer.Argument(metavar="SESSION", help="Session id.")]
Target = Annotated[str, typer.Argument(metavar="HOST:PORT", help="A peer, as configured.")]
File = Annotated[Path, typer.Argument(metavar="FILE")]


@dataclass
class _Target:
    url: str = DEFAULT_URL
    tenant: str = DEFAULT_TENANT
    credentials: Credentials = field(default_factory=Credentials)


_target = _Target()


@app.callback()
def choose(
    agent: Annotated[
        str, typer.Option(metavar="HOST:PORT|URL", help="The agent to talk to.")
    ] = credentials.DEFAULT_AGENT,
    tenant: Annotated[str, typer.Option(help="Whose sessions.")] = DEFAULT_TENANT,
    token_file: TokenFile = None,
    ca: CaFile = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
) -> None:
    """Sessions of one tenant at one agent. MCP_VLLM_TOKEN does instead of --token-file."""
    _target.credentials = credentials.given(token_file, ca, cert, key)
    _target.url = _target.credentials.url(agent)
    _target.tenant = tenant


@contextmanager
def _client() -> Iterator[MCPClient]:
    try:
        options = {"verify": _target.credentials.tls} if _target.credentials.tls else {}
        token = _target.credentials.token
        with MCPClient(_target.url, _target.tenant, token, **options) as client:
            yield client
    except ApiError as error:
        if error.status:
            raise
        raise ApiError(0, f"{_target.url}: {error} (name the agent with --agent)") from error


@app.command("list")
def list_sessions(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """The tenant's sessions, least recently used first."""
    with _client() as client:
        sessions = sorted(client.sessions(), key=lambda each: each.last_used_s)
    if as_json:
        typer.echo(msgspec.json.encode(sessions).decode())
        return
    table = Table()
    for title in ("session", "tokens", "turns", "chunks here", "MiB raw", "MiB held", "state"):
        table.add_column(title, overflow="fold")
    for each in sessions:
        table.add_row(
            escape(each.session_id),
            str(each.num_tokens),
            str(each.turns),
            f"{each.held_chunks} of {each.num_chunks}",
            _mib(each.raw_bytes),
            _mib(each.held_bytes),
            _state(each),
        )
    console.print(table)


@app.command()
def show(session: SessionId) -> None:
    """Everything that is known of a session, as JSON."""
    with _client() as client:
        summary = client.session(session)
    typer.echo(msgspec.json.format(msgspec.json.encode(summary)).decode())


@app.command()
def copy(session: SessionId, to: Target) -> None:
    """Copy a session to a peer; only what is missing there travels."""
    with _client() as client:
        _say_transfer(session, f"is at {to} too", client.copy(session, to=to))


@app.command()
def move(session: SessionId, to: Target) -> None:
    """Move a session to a peer: copied, verified, then released here."""
    with _client() as client:
        _say_transfer(session, f"moved to {to}", client.move(session, to=to))


@app.command()
def prefetch(session: SessionId) -> None:
    """Let the agent fetch a session from its peers, before a request needs it."""
    with _client() as client:
        _say_transfer(session, "is here", client.prefetch(session))


@app.command()
def fork(session: SessionId, new_id: Annotated[str, typer.Argument(metavar="NEW_ID")]) -> None:
    """The same context under another id; nothing is copied."""
    with _client() as client:
        client.fork(session, new_id)
    console.print(f"{escape(new_id)} shares the context of {escape(session)}")


@app.command()
def pin(
    session: SessionId,
    ttl: Annotated[str, typer.Option(help="How long: 90s, 30m, 12h, 2d.")] = "1h",
) -> None:
    """Keep a session in memory for a time, whatever else comes."""
    with _client() as client:
        pinned = client.pin(session, seconds_of(ttl))
    until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(pinned.pinned_until_s))
    console.print(f"{escape(session)} is pinned until {until}")


@app.command()
def unpin(session: SessionId) -> None:
    """End a pin."""
    with _client() as client:
        client.unpin(session)


@app.command()
def park(session: SessionId) -> None:
    """Write a session to the agent's parking folder and free its memory."""
    with _client() as client:
        client.park(session)
    console.print(f"{escape(session)} is parked")


@app.command()
def wake(session: SessionId) -> None:
    """Bring a parked session back into memory."""
    with _client() as client:
        woken = client.wake(session)
    console.print(f"{escape(session)} is awake: {woken.held_chunks} chunks in memory")


@app.command()
def delete(session: SessionId) -> None:
    """Forget a session and the chunks that no other session has."""
    with _client() as client:
        client.delete(session)


@app.command("export")
def export_session(session: SessionId, file: File) -> None:
    """Write a session to one checksummed file; an interrupted export goes on where it stopped."""
    with _client() as client:
        client.export(session, file)
    console.print(f"wrote {file}, {_mib(file.stat().st_size)} MiB")


@app.command("import")
def import_session(
    file: File,
    session: Annotated[
        str | None, typer.Option("--as", metavar="SESSION", help="Under this id.")
    ] = None,
) -> None:
    """Take a session over from a file."""
    with _client() as client:
        summary = client.import_file(file, session)
    console.print(f"{escape(summary.session_id)} is here: {summary.num_tokens} tokens")


@app.command()
def drain() -> None:
    """Move every session of the agent to its peers, before it is shut down."""
    failed = 0
    with _client() as client, Progress(transient=True) as progress:
        bar = progress.add_task("sessions", total=None)
        for step in client.drain():
            progress.update(bar, completed=step.done, total=step.total)
            if step.error:
                failed += 1
                progress.console.print(f"{step.tenant}/{step.session_id} stays: {step.error}")
    if failed:
        console.print(f"{failed} sessions could not be moved")
        raise typer.Exit(1)
    console.print("every session has moved")


def _say_transfer(session: str, what: str, transfer: Transfer) -> None:
    console.print(
        f"{escape(session)} {what}: {transfer.num_sent} of {transfer.num_chunks} chunks sent, "
        f"{_mib(transfer.raw_bytes)} MiB as {_mib(transfer.wire_bytes)} MiB"
    )


def _state(session: SessionSummary) -> str:
    words = [word for word, holds in (("parked", session.parked),
                                      ("pinned", session.pinned_until_s)) if holds]  # fmt: skip
    if session.loss != "none":
        words.append(session.loss)
    return ", ".join(words)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f}"
