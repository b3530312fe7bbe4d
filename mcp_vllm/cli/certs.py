"""`mcp-vllm certs`: a CA of your own and certificates of hosts, for tests and private networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcp_vllm.security.certificates import ca_in, write_host_files

app = typer.Typer(add_completion=False, help="Make a CA, and certificates for hosts and clients.")


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files go.")],
    hosts: Annotated[
        list[str], typer.Argument(metavar="HOST...", help="Names or addresses that peers dial.")
    ],
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long they are valid.")] = 365,
) -> None:
    """Write HOST.pem and HOST-key.pem for each host, signed by the CA of the folder, which is made
    the first time. Nothing is overwritten. Keep ca-key.pem off the hosts."""
    ca = ca_in(folder)
    for host in hosts:
        for path in write_host_files(folder, ca, host, days):
            typer.echo(str(path))
