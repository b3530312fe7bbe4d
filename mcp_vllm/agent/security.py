"""What the security settings amount to for one agent, and the files behind them kept fresh."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import TypedDict

from mcp_vllm.config import SecurityConfig
from mcp_vllm.security.audit import Audit
from mcp_vllm.security.errors import SecurityError
from mcp_vllm.security.seals import Seals
from mcp_vllm.security.tls import Tls, TlsFiles
from mcp_vllm.security.tokens import TokenFile, TokenVerifier

logger = logging.getLogger(__name__)

# Certificates, keys and tokens that have been replaced are in use after so long.
CHECK_S = 5.0


class RequestOptions(TypedDict, total=False):
    """What a request to a peer takes beside its own arguments."""

    headers: dict[str, str]
    ssl: ssl.SSLContext


class AgentSecurity:
    """Owned by the agent's event loop.

    Attributes:
        tls, tokens: None where they are not configured.
        seals: what opens and seals blocks.
    """

    def __init__(self, config: SecurityConfig) -> None:
        """Raises SecurityError when a file cannot be used."""
        self.tls = _tls(config)
        self.tokens: TokenVerifier | None = None
        self._own_token: TokenFile | None = None
        if config.token_keys is not None:
            self.tokens = TokenVerifier(config.token_keys, config.audience, config.clock_skew_s)
        if config.own_token_file is not None:
            self._own_token = TokenFile(config.own_token_file)
        self.seals = Seals(config.seal_keys)
        self.audit = Audit(config.audit_file)
        self._logged: dict[str, str] = {}

    @property
    def is_required(self) -> bool:
        """Whether a request must say who asks."""
        return self.tls is not None or self.tokens is not None

    @property
    def scheme(self) -> str:
        return "http" if self.tls is None else "https"

    def server_context(self) -> ssl.SSLContext | None:
        """For the next connection; None for plain HTTP."""
        return None if self.tls is None else self.tls.server

    def request_options(self) -> RequestOptions:
        """Our certificate and token as they are now, for a request to a peer."""
        options = RequestOptions()
        if self.tls is not None:
            options["ssl"] = self.tls.client
        if self._own_token is not None:
            options["headers"] = {"Authorization": f"Bearer {self._own_token.token}"}
        return options

    async def watch(self) -> None:
        """Take replaced files into use, for ever."""
        while True:
            await asyncio.sleep(CHECK_S)
            self.reload()

    def reload(self) -> None:
        """Take replaced files into use now; what cannot be used is logged once and left."""
        for what, source in (
            ("certificates", self.tls),
            ("token keys", self.tokens),
            ("own token", self._own_token),
            ("seal keys", self.seals),
        ):
            if source is not None:
                self._reload(what, source.reload)

    def close(self) -> None:
        self.audit.close()

    def _reload(self, what: str, reload: Callable[[], bool]) -> None:
        try:
            changed = reload()
        except SecurityError as error:
            if self._logged.get(what) != str(error):
                self._logged[what] = str(error)
                logger.error("%s cannot be replaced, the old ones stay: %s", what, error)
                self.audit.record("keys", what=what, result="failed", reason=str(error))
            return
        self._logged.pop(what, None)
        if changed:
            logger.info("%s replaced", what)
            self.audit.record("keys", what=what, result="replaced")


def _tls(config: SecurityConfig) -> Tls | None:
    files = config.tls
    if files.certificate is None or files.key is None or files.ca is None:
        return None
    return Tls(TlsFiles(files.certificate, files.key, files.ca))
