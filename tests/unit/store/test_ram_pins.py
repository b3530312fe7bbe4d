"""Pinned chunks stay, whatever else comes; the accounts hold."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_vllm.codec import ChunkLayout
from mcp_vllm.store.chunk_policy import ChunkPolicy
from mcp_vllm.store.ram import ENTRY_OVERHEAD_BYTES, Chunk, ChunkKey, RamStore

SIZE = 100
SLOTS = 10
BUDGET_BYTES = SLOTS * (SIZE + ENTRY_OVERHEAD_BYTES)

names = st.integers(0, 20).map(lambda number: ChunkKey(b"n", number.to_bytes(8, "big")))


def chunk() -> Chunk:
    return Chunk(ChunkLayout("u8"), SIZE, raw=np.zeros(SIZE, np.uint8))


def store_of(budget_bytes: int) -> RamStore:
    return RamStore(budget_bytes, ChunkPolicy(budget_bytes, max_ghosts=64))


@settings(max_examples=20, deadline=None)
@given(
    pinned=st.lists(names, unique=True, max_size=SLOTS // 2),
    later=st.lists(names, max_size=60),
    encode=st.booleans(),
)
def test_pinned_chunks_never_leave_until_they_are_unpinned(pinned, later, encode):
    store = store_of(BUDGET_BYTES)
    for name in pinned:
        store.put(name, chunk())
    assert store.pin(pinned, max_share=0.5)
    assert store.pin(pinned, max_share=0.5), "a second pin holds nothing more"
    for name in later:
        assert store.put(name, chunk())
        if encode and (waiting := store.next_raw()) is not None:
            store.set_frame(*waiting, bytes(SIZE // 2))
        store.check_integrity()
    assert all(name in store for name in pinned)
    store.unpin(pinned)
    store.check_integrity()
    for number in range(100, 100 + SLOTS):
        store.put(ChunkKey(b"n", number.to_bytes(8, "big")), chunk())
    assert all(name in store for name in pinned), "one of two pins is left"
    store.unpin(pinned)
    for number in range(200, 200 + 2 * SLOTS):
        name = ChunkKey(b"n", number.to_bytes(8, "big"))
        store.put(name, chunk())
        store.touch([name])
        store.touch([name])
    assert not any(name in store for name in pinned)
    store.check_integrity()


def test_no_more_than_the_share_can_be_pinned():
    store = store_of(BUDGET_BYTES)
    many = [ChunkKey(b"n", number.to_bytes(8, "big")) for number in range(SLOTS)]
    for name in many:
        store.put(name, chunk())
    assert not store.pin(many, max_share=0.5)
    assert store.pin(many[:5], max_share=0.5)
    assert not store.pin(many[5:6], max_share=0.5)
    store.check_integrity()


def test_a_better_copy_of_a_pinned_chunk_is_pinned_too():
    store = store_of(BUDGET_BYTES)
    name = ChunkKey(b"n", b"12345678")
    lossy = chunk()
    lossy.loss = "small"
    store.put(name, lossy)
    store.pin([name], max_share=0.5)
    store.put(name, chunk())
    store.check_integrity()
    assert store.get(name).loss == ""
    store.unpin([name])
    store.check_integrity()


def test_what_is_discarded_is_not_pinned_any_more():
    store = store_of(BUDGET_BYTES)
    name = ChunkKey(b"n", b"12345678")
    store.put(name, chunk())
    store.pin([name], max_share=0.5)
    store.discard(name)
    store.unpin([name])
    store.check_integrity()
