"""`mcp-vllm token`: a bearer token from a signing key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcp_vllm.cli.duration import seconds_of
from mcp_vllm.security.tokens import mint

app = typer.Typer(add_completion=False, help="Make a bearer token from a signing key.")


@app.command()
def token(
    key: Annotated[
        Path, typer.Option("--key", metavar="FILE", help="Private key in PEM, or HS256 secret.")
    ],
    kid: Annotated[str, typer.Option(help="Its name in the agents' security.token_keys.")],
    sub: Annotated[str, typer.Option(help="Who will present it.")],
    scope: Annotated[
        str,
        typer.Option(
            help="Of sessions:read sessions:write blocks:read stage:run admin; space between."
        ),
    ],
    tenant: Annotated[
        str | None, typer.Option(help="The only tenant it sees; without: all (admin, agents).")
    ] = None,
    ttl: Annotated[str, typer.Option(help="How long it is good: 90s, 30m, 12h, 2d.")] = "1h",
    audience: Annotated[str, typer.Option(help="The agents' security.audience.")] = "mcp-vllm",
) -> None:
    """Print a token, and nothing else."""
    typer.echo(mint(key, kid, audience, sub, frozenset(scope.split()), tenant, seconds_of(ttl)))
