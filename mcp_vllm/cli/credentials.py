"""The options with which a command says who it is, to an agent that wants to know."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from mcp_vllm.config import Address, AgentConfig
from mcp_vllm.security.errors import SecurityError
from mcp_vllm.security.tls import client_context
from mcp_vllm.security.tokens import read_token

TOKEN_VARIABLE = "MCP_VLLM_TOKEN"
DEFAULT_AGENT = AgentConfig().listen

TokenFile = Annotated[
    Path | None, typer.Option("--token-file", metavar="FILE", help="Bearer token to present.")
]
CaFile = Annotated[
    Path | None, typer.Option("--ca", metavar="FILE", help="CA of the agents: use TLS.")
]
CertificateFile = Annotated[
    Path | None, typer.Option("--cert", metavar="FILE", help="Client certificate.")
]
KeyFile = Annotated[Path | None, typer.Option("--key", metavar="FILE", help="Its private key.")]


@dataclass(frozen=True)
class Credentials:
    """`tls` None: plain HTTP, or what the system trusts where the URL says https."""

    token: str | None = None
    tls: ssl.SSLContext | None = None

    def url(self, agent: str) -> str:
        """The URL of HOST:PORT, or the URL itself.

        Raises:
            SecurityError: the token would cross a network in the clear.
        """
        url = agent if "://" in agent else f"{'https' if self.tls else 'http'}://{agent}"
        parts = urlsplit(url)
        is_safe = parts.scheme == "https" or Address(parts.hostname or "", 0).is_loopback
        if self.token and not is_safe:
            raise SecurityError(f"{url}: tokens go over TLS only: name the agents' CA with --ca")
        return url


def given(
    token_file: Path | None, ca: Path | None, certificate: Path | None, key: Path | None
) -> Credentials:
    """What the options say; MCP_VLLM_TOKEN where no token file is named. Raises SecurityError."""
    if certificate is not None and ca is None:
        raise SecurityError("--cert needs --ca: the CA that signed the agent's certificate")
    token = read_token(token_file) if token_file else os.environ.get(TOKEN_VARIABLE, "").strip()
    return Credentials(token or None, client_context(ca, certificate, key) if ca else None)
