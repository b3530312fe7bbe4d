"""`mcp-vllm cache`: why blocks are kept, or are not."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from mcp_vllm.cli import credentials
from mcp_vllm.cli.credentials import CaFile, CertificateFile, KeyFile, TokenFile
from mcp_vllm.client import ApiError, MCPClient
from mcp_vllm.session.cache_api import BlockView, CacheView, TierView
from mcp_vllm.session.manifest import DEFAULT_TENANT

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Say why blocks are kept, or are not."
)


@app.callback()
def cache() -> None:
    """What the agent's cache holds, and why."""


@app.command()
def explain(
    what: Annotated[str, typer.Argument(metavar="SESSION|KEY", help="Session id, or block key.")],
    agent: Annotated[
        str, typer.Option(metavar="HOST:PORT|URL", help="The agent to ask.")
    ] = credentials.DEFAULT_AGENT,
    tenant: Annotated[str, typer.Option(help="Whose.")] = DEFAULT_TENANT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    token_file: TokenFile = None,
    ca: CaFile = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
) -> None:
    """The features of each block of a session, or of one block, and its score in memory and on
    disk beside the score of what left last: below that, it is next."""
    using = credentials.given(token_file, ca, cert, key)
    options = {"verify": using.tls} if using.tls else {}
    with MCPClient(using.url(agent), tenant, using.token, **options) as client:
        view = _ask(client, what)
    if as_json:
        typer.echo(msgspec.json.encode(view).decode())
    else:
        Console().print(_table(view))
        if view.num_more:
            typer.echo(f"and {view.num_more} more")
        if len(view.blocks) == 1:
            _tell_features(view.blocks[0])


def _ask(client: MCPClient, what: str) -> CacheView:
    """A session of that name, if there is one, or a block of that key."""
    try:
        return client.explain_session(what)
    except ApiError as error:
        if error.status != 404 or not _is_hexadecimal(what):
            raise
    return client.explain_block(what)


def _is_hexadecimal(text: str) -> bool:
    try:
        return bool(bytes.fromhex(text))
    except ValueError:
        return False


def _table(view: CacheView) -> Table:
    table = Table(caption="score and limit: saved ms a MiB and hour; limit: of what left last")
    for title in ("block", "tier", "state", "score", "limit", "age s", "uses", "turn", "KiB", "ms"):
        table.add_column(title)
    for block in view.blocks:
        for tier, seen in _tiers(block):
            table.add_row(f"{block.key[:6]}..{block.key[-8:]}", tier, *_cells(seen))
    return table


def _tiers(block: BlockView) -> list[tuple[str, TierView]]:
    tiers = (("memory", block.memory), ("disk", block.disk))
    return [(tier, seen) for tier, seen in tiers if seen is not None]


def _cells(seen: TierView) -> list[str]:
    return [
        "pinned" if seen.pinned else "kept" if seen.held else "gone",
        _per_mib_hour(seen.score),
        _per_mib_hour(seen.threshold),
        f"{seen.age_s:.1f}",
        str(seen.uses),
        str(seen.turn),
        f"{seen.size_bytes / 1024:.0f}",
        f"{seen.saved_ms:.1f}",
    ]


def _tell_features(block: BlockView) -> None:
    for tier, seen in _tiers(block):
        levels = " ".join(f"{name}={level}" for name, level in seen.levels.items())
        factors = ", ".join(f"{name}: x{factor:.2f}" for name, factor in seen.factors.items())
        typer.echo(f"{tier}: levels {levels}")
        tables = f"by tables {factors}" if factors else "no tables: many requests share it"
        typer.echo(f"{tier}: hazard at its age {seen.hazard:.3f}, {tables}")


def _per_mib_hour(score: float) -> str:
    return f"{score * (1 << 20) * 3600:.3g}"
