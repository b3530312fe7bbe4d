"""TLS 1.3 contexts from PEM files, made anew when the files change.

A change makes new contexts instead of loading into the old ones, so that a CA that was taken out
is really out. Open connections keep what they began with.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from mcp_vllm.security.errors import SecurityError
from mcp_vllm.security.file_stamp import Stamp, stamp


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: our chain, its private key, and the CA that signs our agents and clients."""

    certificate: Path
    key: Path
    ca: Path


class Tls:
    """The present contexts of one agent.

    Attributes:
        server: asks for a client certificate and refuses one that `ca` did not sign; a client
            without one is let in as far as the HTTP layer, which decides.
        client: presents our certificate, verifies the other's and its host name.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Raises SecurityError when the files cannot be used."""
        self._files = files
        self._load()

    def reload(self) -> bool:
        """Whether the files had changed; then the contexts are new.

        Raises:
            SecurityError: they have changed and cannot be used (yet): the old contexts stay.
        """
        if self._stamp_now() == self._stamp:
            return False
        self._load()
        return True

    def _load(self) -> None:
        # Taken before the files are read: what changes meanwhile is seen the next time.
        present = self._stamp_now()
        server = server_context(self._files)
        client = client_context(self._files.ca, self._files.certificate, self._files.key)
        self.server, self.client, self._stamp = server, client, present

    def _stamp_now(self) -> Stamp:
        try:
            return stamp([self._files.certificate, self._files.key, self._files.ca])
        except OSError as error:
            raise SecurityError(f"security.tls: {error}") from error


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """Raises SecurityError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_OPTIONAL
    _load_ca(context, files.ca)
    _load_chain(context, files.certificate, files.key)
    return context


def client_context(
    ca: Path | None, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """Trusts `ca` alone (None: what the system trusts). Raises SecurityError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if ca is None:
        context.load_default_certs()
    else:
        _load_ca(context, ca)
    if certificate is not None:
        _load_chain(context, certificate, key)
    return context


def _load_ca(context: ssl.SSLContext, ca: Path) -> None:
    try:
        context.load_verify_locations(ca)
    except OSError as error:  # ssl.SSLError is one
        raise SecurityError(f"CA file {ca}: {_reason(error)}") from error


def _load_chain(context: ssl.SSLContext, certificate: Path, key: Path | None) -> None:
    try:
        # Without a password of ours OpenSSL would ask the terminal for that of an encrypted key.
        context.load_cert_chain(certificate, key, password="")
    except OSError as error:
        raise SecurityError(
            f"certificate {certificate} with key {key or certificate}: {_reason(error)}"
        ) from error


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"not usable ({error.reason or 'no PEM, or an encrypted key'})"
    return error.strerror or str(error)
