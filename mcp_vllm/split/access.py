"""Who may have a lease at a stage, as its `security` settings say."""

from __future__ import annotations

import logging
import socket
import ssl

from mcp_vllm.config.split import StageSecurity
from mcp_vllm.security.errors import SecurityError
from mcp_vllm.security.principal import STAGE_RUN
from mcp_vllm.security.tls import Tls, TlsFiles
from mcp_vllm.security.tokens import TokenError, TokenVerifier

logger = logging.getLogger(__name__)


class AccessDenied(SecurityError):
    """Says why, without repeating what was presented."""


class Access:
    """Shared by the stage's connection threads. Replaced files are used at the next connection."""

    def __init__(self, config: StageSecurity) -> None:
        """Raises SecurityError when a file cannot be used."""
        files = config.tls
        self._tls: Tls | None = None
        if files.certificate is not None and files.key is not None and files.ca is not None:
            self._tls = Tls(TlsFiles(files.certificate, files.key, files.ca))
        self._tokens: TokenVerifier | None = None
        if config.token_keys is not None:
            self._tokens = TokenVerifier(config.token_keys, config.audience, config.clock_skew_s)

    def secure(self, connected: socket.socket) -> socket.socket:
        """The connection in TLS, if that is configured. Raises OSError: no handshake."""
        if self._tls is None:
            return connected
        _renew(self._tls)
        return self._tls.server.wrap_socket(connected, server_side=True)

    def check(self, connected: socket.socket, token: str | None) -> None:
        """Raises AccessDenied."""
        if self._tokens is not None:
            _renew(self._tokens)
            self._check_token(self._tokens, token)
        elif isinstance(connected, ssl.SSLSocket) and not connected.getpeercert():
            raise AccessDenied("a client certificate of our CA is needed, and none was presented")

    def _check_token(self, tokens: TokenVerifier, token: str | None) -> None:
        if token is None:
            raise AccessDenied('a token is needed: set "token_file" in the file of --mcp-split')
        try:
            principal = tokens.verify(token)
        except TokenError as error:
            raise AccessDenied(str(error)) from None
        if STAGE_RUN not in principal.scopes:
            raise AccessDenied(f"the token lacks the scope {STAGE_RUN}")


def _renew(files: Tls | TokenVerifier) -> None:
    """Take replaced files into use; those that cannot be used leave the old ones."""
    try:
        files.reload()
    except SecurityError as error:
        logger.error("replaced files cannot be used, the old ones stay: %s", error)
