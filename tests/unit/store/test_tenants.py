"""A tenant over its quota loses chunks of its own, and nobody else's, whatever happens."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mcp_vllm.codec import ChunkLayout
from mcp_vllm.store.chunk_policy import ChunkPolicy
from mcp_vllm.store.ram import ENTRY_OVERHEAD_BYTES, Chunk, ChunkKey, RamStore

SLOT = ENTRY_OVERHEAD_BYTES + 300
QUOTAS = {"a": 3 * SLOT, "b": 4 * SLOT, "free": 0}

numbers = st.integers(0, 9)
tenants = st.sampled_from(sorted(QUOTAS))


def name_of(tenant: str, number: int) -> ChunkKey:
    return ChunkKey(b"n", number.to_bytes(8, "big"), tenant)


def chunk_of(size: int) -> Chunk:
    return Chunk(ChunkLayout("u8"), size, raw=np.zeros(size, np.uint8))


def store_of(budget_bytes: int) -> RamStore:
    policy = ChunkPolicy(budget_bytes, quota_of=lambda tenant: QUOTAS.get(tenant, 0), max_ghosts=64)
    return RamStore(budget_bytes, policy)


class QuotasAgainstEverything(RuleBasedStateMachine):
    """With room for everybody's quota, a chunk leaves by its own tenant's doing or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.store = store_of(7 * SLOT + 10 * (ENTRY_OVERHEAD_BYTES + 800))
        self.lost: list[str] = []
        self.store.over_quota.append(lambda name: self.lost.append(name.tenant))
        self.store.watchers.append(self.watch)
        self.gone: set[str] = set()

    def watch(self, name: ChunkKey, present: bool) -> None:
        if not present:
            self.gone.add(name.tenant)

    @rule(tenant=tenants, number=numbers, size=st.integers(1, 800))
    def put(self, tenant: str, number: int, size: int) -> None:
        self.gone, self.lost = set(), []
        kept = self.store.put(name_of(tenant, number), chunk_of(size))
        assert self.gone <= {tenant}
        assert kept == (name_of(tenant, number) in self.store)
        if tenant == "free":
            assert kept
            assert not self.gone

    @rule(tenant=tenants, number=numbers, size=st.integers(1, 900))
    def encode(self, tenant: str, number: int, size: int) -> None:
        self.gone = set()
        name = name_of(tenant, number)
        chunk = self.store.get(name)
        if chunk is not None and chunk.frame is None and size <= chunk.raw_bytes:
            self.store.set_frame(name, chunk, bytes(size))
            assert self.gone <= {tenant}

    @rule(tenant=tenants, chain=st.lists(numbers, max_size=4))
    def touch(self, tenant: str, chain: list[int]) -> None:
        self.store.touch([name_of(tenant, number) for number in chain])

    @rule(tenant=tenants, number=numbers)
    def pin(self, tenant: str, number: int) -> None:
        self.store.pin([name_of(tenant, number)], 0.3)

    @rule(tenant=tenants, number=numbers)
    def unpin(self, tenant: str, number: int) -> None:
        self.store.unpin([name_of(tenant, number)])

    @rule(tenant=tenants, number=numbers)
    def discard(self, tenant: str, number: int) -> None:
        self.store.discard(name_of(tenant, number))

    @invariant()
    def nobody_holds_more_than_its_quota(self) -> None:
        self.store.check_integrity()
        for tenant, quota in QUOTAS.items():
            assert not quota or self.store.tenants.held_bytes(tenant) <= quota


QuotasAgainstEverything.TestCase.settings = settings(
    max_examples=15, stateful_step_count=40, deadline=None
)
TestQuotas = QuotasAgainstEverything.TestCase


def test_over_its_quota_a_tenant_loses_what_it_used_longest_ago_and_that_is_told() -> None:
    store, left = store_of(100 * SLOT), []
    store.over_quota.append(left.append)
    for number in range(3):
        assert store.put(name_of("a", number), chunk_of(300))
    assert store.put(name_of("b", 0), chunk_of(300))
    for number in (1, 0, 2):
        store.touch([name_of("a", number)])
    assert store.put(name_of("a", 3), chunk_of(300))
    assert left == [name_of("a", 1)]
    assert name_of("b", 0) in store


def test_a_chunk_larger_than_the_quota_is_not_kept_and_costs_nothing() -> None:
    store = store_of(100 * SLOT)
    store.put(name_of("a", 0), chunk_of(300))
    assert not store.put(name_of("a", 1), chunk_of(4 * SLOT))
    assert list(store) == [name_of("a", 0)]


def test_who_else_has_a_chunk_of_that_content_is_known() -> None:
    store = store_of(100 * SLOT)
    for tenant in ("a", "b"):
        store.put(name_of(tenant, 7), chunk_of(10))
    key = name_of("a", 7).key
    assert set(store.tenants.holders(b"n", key)) == {"default", "a", "b"}
    store.discard(name_of("a", 7))
    assert set(store.tenants.holders(b"n", key)) == {"default", "b"}
