"""Who asks, and what they may do. Frozen data."""

from __future__ import annotations

from dataclasses import dataclass

SESSIONS_READ = "sessions:read"
SESSIONS_WRITE = "sessions:write"
BLOCKS_READ = "blocks:read"
STAGE_RUN = "stage:run"
ADMIN = "admin"
SCOPES = (SESSIONS_READ, SESSIONS_WRITE, BLOCKS_READ, STAGE_RUN, ADMIN)


@dataclass(frozen=True)
class Principal:
    """One who asks.

    Attributes:
        name: for the audit; "token:SUB" or "certificate:NAME".
        scopes: of SCOPES; `admin` does not imply the others.
        tenant: the only tenant that exists for them; None: all.
    """

    name: str
    scopes: frozenset[str]
    tenant: str | None = None

    def sees(self, tenant: str) -> bool:
        return self.tenant is None or self.tenant == tenant


# Where nothing is configured: this host's users, on a loopback address.
ANYBODY = Principal("anybody", frozenset(SCOPES))
