"""On whose behalf chunks are read: which tenants' chunks count, and what of them can be used.

Engines and peers ask as a tenant. A chunk of another tenant is a miss for them, in the same words
and by the same code as one that nobody has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mcp_vllm.codec.loss import is_acceptable
from mcp_vllm.store.ram import ChunkKey
from mcp_vllm.store.tiers import Held, Tiers


@dataclass(frozen=True)
class Reader:
    """Attributes:
    tenants: whose chunks it may use, its own first.
    lossy: tiers that it accepts.
    opens: for each of the tenants, ids of the keys that open its sealed frames there; a tenant
        without any: only what is not sealed can be used.
    """

    tenants: Sequence[str]
    lossy: Sequence[str] = ()
    opens: Sequence[Sequence[str]] = ()

    def own(self, namespace: bytes, key: bytes) -> ChunkKey:
        return ChunkKey(namespace, key, self.tenants[0])

    def names(self, namespace: bytes, key: bytes) -> Iterator[ChunkKey]:
        return (ChunkKey(namespace, key, tenant) for tenant in self.tenants)

    def held(self, tiers: Tiers, namespace: bytes, key: bytes) -> ChunkKey | None:
        """The chunk of that key that it would get, readable or not; None: a miss."""
        for name in self.names(namespace, key):
            held = tiers.find(name)
            if held is not None and is_acceptable(held.loss, self.lossy):
                return name
        return None

    def usable(
        self,
        tiers: Tiers,
        namespace: bytes,
        key: bytes,
        sealed_by: Callable[[ChunkKey, Held], str],
    ) -> ChunkKey | None:
        """The chunk of that key that it can use; `sealed_by` says which key it is sealed with."""
        for index, name in enumerate(self.names(namespace, key)):
            held = tiers.find(name)
            if held is None or not is_acceptable(held.loss, self.lossy):
                continue
            opens = self.opens[index] if self.opens else ()
            if sealed_by(name, held) in (opens or ("",)):
                return name
        return None
