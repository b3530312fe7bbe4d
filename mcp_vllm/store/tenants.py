"""What each tenant has in a store: its bytes, its quota, and what leaves when that is exceeded.

A tenant over its quota loses chunks of its own, those used longest ago first; nobody else's. Kept
by `RamStore`, in the agent's event loop. Tenants without a quota cost a counter each.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from mcp_vllm.session.manifest import DEFAULT_TENANT

if TYPE_CHECKING:
    from mcp_vllm.store.ram import ChunkKey

QuotaOf = Callable[[str], int]


def _no_quota(tenant: str) -> int:
    return 0


class TenantLedger:
    """See the module's docstring.

    Args:
        quota_of: bytes that a tenant may hold; 0: no quota.
    """

    def __init__(self, quota_of: QuotaOf = _no_quota) -> None:
        self._quota_of = quota_of
        self._bytes: Counter[str] = Counter()
        # Of tenants with a quota, by last use.
        self._order: dict[str, OrderedDict[ChunkKey, int]] = {}
        # Who has a chunk beside the default tenant, by namespace and key.
        self._holders: dict[tuple[bytes, bytes], list[str]] = {}

    def held_bytes(self, tenant: str) -> int:
        return self._bytes[tenant]

    def holders(self, namespace: bytes, key: bytes) -> Iterable[str]:
        """Tenants that may have this content."""
        return (DEFAULT_TENANT, *self._holders.get((namespace, key), ()))

    def added(self, name: ChunkKey, held_bytes: int) -> None:
        tenant = name.tenant
        self._bytes[tenant] += held_bytes
        if self._quota_of(tenant):
            self._order.setdefault(tenant, OrderedDict())[name] = held_bytes
        if tenant != DEFAULT_TENANT:
            self._holders.setdefault(name[:2], []).append(tenant)

    def removed(self, name: ChunkKey, held_bytes: int) -> None:
        tenant = name.tenant
        self._bytes[tenant] -= held_bytes
        if not self._bytes[tenant]:
            del self._bytes[tenant]
        order = self._order.get(tenant)
        if order is not None:
            order.pop(name, None)
            if not order:
                del self._order[tenant]
        if tenant != DEFAULT_TENANT:
            holders = self._holders[name[:2]]
            holders.remove(tenant)
            if not holders:
                del self._holders[name[:2]]

    def resized(self, name: ChunkKey, grown_bytes: int) -> None:
        self._bytes[name.tenant] += grown_bytes
        order = self._order.get(name.tenant)
        if order is not None:
            order[name] += grown_bytes

    def touched(self, name: ChunkKey) -> None:
        order = self._order.get(name.tenant)
        if order is not None:
            order.move_to_end(name)

    def victims(
        self, tenant: str, added_bytes: int, is_kept: Callable[[ChunkKey], bool]
    ) -> list[ChunkKey] | None:
        """The tenant's chunks that must leave so that `added_bytes` fit into its quota; None when
        they cannot, because too much of it is kept."""
        quota = self._quota_of(tenant)
        surplus = self._bytes[tenant] + added_bytes - quota if quota else 0
        chosen: list[ChunkKey] = []
        for name, held_bytes in self._order.get(tenant, {}).items():
            if surplus <= 0:
                break
            if not is_kept(name):
                chosen.append(name)
                surplus -= held_bytes
        return chosen if surplus <= 0 else None

    def check_integrity(self, held: dict[ChunkKey, int]) -> None:
        """Recount, for tests. Raises AssertionError."""
        counted: Counter[str] = Counter()
        for name, held_bytes in held.items():
            counted[name.tenant] += held_bytes
            if self._quota_of(name.tenant):
                assert self._order[name.tenant][name] == held_bytes
        assert counted == self._bytes
        assert sum(len(order) for order in self._order.values()) <= len(held)
        others = sum(name.tenant != DEFAULT_TENANT for name in held)
        assert sum(len(each) for each in self._holders.values()) == others
