"""Manifests: what a session's context consists of, without its bytes.

A session is `(tenant, session_id)`. Its manifest lists, per KV cache group, the chained keys of its
chunks in order, so "how far do you have this chain" is one number per group. Owned by the agent's
event loop; no locks.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence

import msgspec

from mcp_vllm.codec.loss import EXACT, worst
from mcp_vllm.errors import McpError

# Whose requests are that name no tenant.
DEFAULT_TENANT = "default"
MAX_NAME_CHARS = 256
FORMAT_VERSION = 1


class SessionNameError(McpError):
    """A session id or tenant that cannot be used as a name."""


def checked_name(kind: str, value: object) -> str:
    """`value` as a session id or tenant (`kind` says which).

    Raises:
        SessionNameError: not a string, empty, longer than 256 characters, or not printable.
    """
    if not isinstance(value, str):
        raise SessionNameError(f"{kind} must be a string, not {type(value).__name__}")
    if not 0 < len(value) <= MAX_NAME_CHARS:
        raise SessionNameError(f"{kind} must have 1 to {MAX_NAME_CHARS} characters")
    if not value.isprintable():
        raise SessionNameError(f"{kind} must be printable text")
    return value


class SessionKey(msgspec.Struct, frozen=True, order=True):
    """A session's name; tenants never share one."""

    tenant: str
    session_id: str


class Manifest(msgspec.Struct, kw_only=True):
    """One session's context.

    `chains[g]` holds the offload keys of KV cache group g in order of position; `loss` is the worst
    that a turn of it was given (`codec.loss`). A parked session's chunks lie in a file, not in
    memory. Times are seconds since the epoch, by this agent's clock. `replica_of` is the id of the
    agent where the session lives, when this is a copy for the case that it is lost; else empty.
    """

    key: SessionKey
    namespace: bytes
    chains: list[list[bytes]]
    num_tokens: int
    turns: int
    created_s: float
    last_used_s: float
    loss: str = EXACT
    parked: bool = False
    replica_of: str = ""
    version: int = FORMAT_VERSION

    @property
    def num_chunks(self) -> int:
        return sum(len(chain) for chain in self.chains)

    def chunk_keys(self) -> list[bytes]:
        """Every key once, group by group in order of position."""
        return list(dict.fromkeys(key for chain in self.chains for key in chain))


class SessionRegistry:
    """The manifests of one agent; the least recently used leave first.

    Args:
        max_sessions: of all tenants together.
        quota_of: sessions that a tenant may have, 0 for no quota; over it, its own leave.

    Attributes:
        over_quota: told of each session that left because its tenant had too many.
        watchers: told of every session's name and its manifest now; None: it is gone.
    """

    def __init__(
        self, max_sessions: int, quota_of: Callable[[str], int] = lambda tenant: 0
    ) -> None:
        self.over_quota: list[Callable[[Manifest], None]] = []
        self.watchers: list[Callable[[SessionKey, Manifest | None], None]] = []
        self._max_sessions = max_sessions
        self._quota_of = quota_of
        # Of tenants with a quota, by last use.
        self._of_tenant: dict[str, OrderedDict[SessionKey, None]] = {}
        self._manifests: OrderedDict[SessionKey, Manifest] = OrderedDict()
        self._uses: Counter[tuple[str, bytes, bytes]] = Counter()

    def __len__(self) -> int:
        return len(self._manifests)

    def __iter__(self) -> Iterator[Manifest]:
        return iter(self._manifests.values())

    def get(self, key: SessionKey) -> Manifest | None:
        """The manifest, or None. Does not count as a use."""
        return self._manifests.get(key)

    def record_turn(
        self,
        key: SessionKey,
        namespace: bytes,
        chains: Sequence[Sequence[bytes]],
        num_tokens: int,
        now_s: float,
        loss: str = EXACT,
    ) -> Manifest:
        """A turn of the session has finished with this chain, which replaces the previous one.

        A chat that was edited continues on another branch: the newest chain is the session's.
        """
        previous = self._manifests.get(key)
        manifest = Manifest(
            key=key,
            namespace=namespace,
            chains=[list(chain) for chain in chains],
            num_tokens=num_tokens,
            turns=previous.turns + 1 if previous else 1,
            created_s=previous.created_s if previous else now_s,
            last_used_s=now_s,
            loss=worst([loss, previous.loss]) if previous else loss,
        )
        self.put(manifest)
        return manifest

    def put(self, manifest: Manifest) -> None:
        """Keep a manifest as the most recently used, in place of an earlier one of its name."""
        self._forget(manifest.key)
        self._manifests[manifest.key] = manifest
        self._uses.update(self._names(manifest))
        self._tell(manifest.key, manifest)
        self._keep_quota(manifest.key)
        while len(self._manifests) > self._max_sessions:
            self.remove(next(iter(self._manifests)))

    def remove(self, key: SessionKey) -> Manifest | None:
        """Forget a manifest; returns it, or None when there is none."""
        manifest = self._forget(key)
        if manifest is not None:
            self._tell(key, None)
        return manifest

    def _tell(self, key: SessionKey, manifest: Manifest | None) -> None:
        for watcher in self.watchers:
            watcher(key, manifest)

    def _forget(self, key: SessionKey) -> Manifest | None:
        manifest = self._manifests.pop(key, None)
        if manifest is not None:
            own = self._of_tenant.get(key.tenant, OrderedDict())
            own.pop(key, None)
            if not own:
                self._of_tenant.pop(key.tenant, None)
            for name in self._names(manifest):
                self._uses[name] -= 1
                if not self._uses[name]:
                    del self._uses[name]
        return manifest

    def _keep_quota(self, key: SessionKey) -> None:
        quota = self._quota_of(key.tenant)
        if not quota:
            return
        own = self._of_tenant.setdefault(key.tenant, OrderedDict())
        own[key] = None
        while len(own) > quota:
            left = self.remove(next(iter(own)))
            for watcher in self.over_quota:
                assert left is not None
                watcher(left)

    def unused(self, manifest: Manifest) -> list[bytes]:
        """Those keys of it that no session here of the same tenant has in its chain."""
        return [name[2] for name in self._names(manifest) if name not in self._uses]

    @staticmethod
    def _names(manifest: Manifest) -> list[tuple[str, bytes, bytes]]:
        tenant, namespace = manifest.key.tenant, manifest.namespace
        return [(tenant, namespace, key) for key in manifest.chunk_keys()]
