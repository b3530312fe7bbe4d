"""HOST:PORT addresses as they are written in the configuration.

Pure functions and frozen data; used by the schema's validators and by whoever listens or dials.
"""

import ipaddress
import re
from dataclasses import dataclass

_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*\.?")
MAX_PORT = 65535


@dataclass(frozen=True)
class Address:
    """A host (name, IPv4, or IPv6 without brackets) and a TCP port; port 0 means any free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read HOST:PORT, an IPv6 host in brackets.

        Raises ValueError that says what is wrong with `text`.
        """
        host, colon, port = text.strip().rpartition(":")
        if not colon or not host:
            raise ValueError(f'"{text}" is not HOST:PORT')
        if not (port.isascii() and port.isdigit()) or int(port) > MAX_PORT:
            raise ValueError(f'"{text}" needs a port from 0 to {MAX_PORT} after the last colon')
        return cls(_canonical_host(host, text), int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; a name other than localhost counts as remote."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _canonical_host(host: str, text: str) -> str:
    """The one spelling of `host`, so that equal addresses compare equal."""
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError as error:
            raise ValueError(f'"{text}" has no IPv6 address between the brackets') from error
    if ":" in host:
        raise ValueError(f'"{text}" needs brackets around its IPv6 address, as in [::1]:7077')
    name = host.lower()
    if name.rpartition(".")[2].isdigit():
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError as error:
            raise ValueError(f'"{text}" has no valid IPv4 address before the port') from error
    if len(name) > 253 or not _NAME.fullmatch(name):
        raise ValueError(f'"{text}" has no valid host name before the port')
    return name
