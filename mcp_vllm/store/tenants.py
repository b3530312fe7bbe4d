"""What each tenant has in a store, and who else has what it has.

Kept by `RamStore`, in the agent's event loop; a tenant costs a counter. Its quota is the policy's
concern.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mcp_vllm.session.manifest import DEFAULT_TENANT

if TYPE_CHECKING:
    from mcp_vllm.store.ram import ChunkKey


class TenantLedger:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()
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
        if tenant != DEFAULT_TENANT:
            self._holders.setdefault(name[:2], []).append(tenant)

    def removed(self, name: ChunkKey, held_bytes: int) -> None:
        tenant = name.tenant
        self._bytes[tenant] -= held_bytes
        if not self._bytes[tenant]:
            del self._bytes[tenant]
        if tenant != DEFAULT_TENANT:
            holders = self._holders[name[:2]]
            holders.remove(tenant)
            if not holders:
                del self._holders[name[:2]]

    def resized(self, name: ChunkKey, grown_bytes: int) -> None:
        self._bytes[name.tenant] += grown_bytes

    def check_integrity(self, held: dict[ChunkKey, int]) -> None:
        """Recount, for tests. Raises AssertionError."""
        counted: Counter[str] = Counter()
        for name, held_bytes in held.items():
            counted[name.tenant] += held_bytes
        assert counted == self._bytes
        others = sum(name.tenant != DEFAULT_TENANT for name in held)
        assert sum(len(each) for each in self._holders.values()) == others
