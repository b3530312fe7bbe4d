"""What each route asks of those who call it. A route without a rule is for `admin` alone."""

from __future__ import annotations

from dataclasses import dataclass

from mcp_vllm.security.principal import ADMIN, BLOCKS_READ, SESSIONS_READ, SESSIONS_WRITE
from mcp_vllm.session.api import BLOCK_CACHE, ONE, SESSION_CACHE


@dataclass(frozen=True)
class Rule:
    """Attributes:
    scope: None: open to everybody.
    event: the kind of audit line that a call leaves; empty: none.
    all_tenants: concerns every tenant, so a token of one tenant does not do.
    """

    scope: str | None
    event: str = ""
    all_tenants: bool = False


_READ = Rule(SESSIONS_READ)
_READ_SESSION = Rule(SESSIONS_READ, "session")
_WRITE_SESSION = Rule(SESSIONS_WRITE, "session")

# Blocks are found by content, not by tenant: whoever may ask for one learns whether it is there.
RULES: dict[tuple[str, str], Rule] = {
    ("GET", "/healthz"): Rule(None),
    # Counts of all tenants together: what another does can be told from them.
    ("GET", "/metrics"): Rule(ADMIN, all_tenants=True),
    ("GET", "/v1/openapi.json"): _READ,
    ("GET", "/v1/peers"): _READ,
    ("GET", "/v1/hello"): Rule(BLOCKS_READ),
    ("POST", "/v1/blocks/lookup"): Rule(BLOCKS_READ, all_tenants=True),
    ("POST", "/v1/directory"): Rule(BLOCKS_READ, all_tenants=True),
    ("POST", "/v1/blocks/fetch"): Rule(BLOCKS_READ, "blocks", all_tenants=True),
    ("GET", f"{ONE}/manifest"): Rule(BLOCKS_READ, "session"),
    ("POST", f"{ONE}/pull"): Rule(BLOCKS_READ, "session"),
    ("POST", f"{ONE}/release"): Rule(BLOCKS_READ, "session"),
    ("GET", "/v1/sessions"): _READ_SESSION,
    ("GET", ONE): _READ_SESSION,
    ("GET", f"{ONE}/export"): _READ_SESSION,
    ("GET", f"{ONE}/placements"): _READ,
    ("POST", "/v1/placements"): _READ,
    ("DELETE", ONE): _WRITE_SESSION,
    ("POST", "/v1/sessions/import"): _WRITE_SESSION,
    ("GET", "/v1/sessions/import"): Rule(SESSIONS_WRITE),
    **{
        ("POST", f"{ONE}/{operation}"): _WRITE_SESSION
        for operation in ("copy", "move", "prefetch", "fork", "pin", "unpin", "park", "wake")
    },
    ("GET", SESSION_CACHE): Rule(ADMIN),
    ("GET", BLOCK_CACHE): Rule(ADMIN),
    ("POST", "/v1/drain"): Rule(ADMIN, "session", all_tenants=True),
}
WITHOUT_RULE = Rule(ADMIN)


def rule_for(method: str, route: str) -> Rule:
    """`route` is the path as registered, with its placeholders."""
    return RULES.get(("GET" if method == "HEAD" else method, route), WITHOUT_RULE)
