"""The inventory that an engine is told is the store's, at every moment that can be observed."""

import asyncio

import numpy as np

from mcp_vllm.agent.inventory import BATCH_S, SLICE_KEYS, InventoryFeed
from mcp_vllm.codec import ChunkLayout
from mcp_vllm.link.protocol import Inventory
from mcp_vllm.store.ram import Chunk, ChunkKey, RamStore

NAMESPACE = b"ours"
SIZE = 1000


def chunk() -> Chunk:
    return Chunk(ChunkLayout("u8"), SIZE, raw=np.zeros(SIZE, dtype=np.uint8))


def name(number: int, namespace: bytes = NAMESPACE) -> ChunkKey:
    return ChunkKey(namespace, number.to_bytes(8, "big"))


class Mirror:
    """What an engine makes of the messages."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()
        self.messages = 0
        self.told = asyncio.Event()

    def take(self, inventory: Inventory) -> None:
        self.messages += 1
        self.keys |= set(inventory.added)
        self.keys -= set(inventory.removed)
        self.told.set()


async def test_the_mirror_follows_commits_evictions_and_discards() -> None:
    store, mirror = RamStore(budget_bytes=10 * (SIZE + 1000)), Mirror()
    store.put(name(0), chunk())
    store.put(name(99, b"theirs"), chunk())
    feed = InventoryFeed(store, NAMESPACE, mirror.take)
    feed.start()
    assert mirror.keys == {name(0).key}
    for number in range(1, 40):
        store.put(name(number), chunk())
    store.discard(name(39))
    before = mirror.messages
    mirror.told.clear()
    await asyncio.wait_for(mirror.told.wait(), 5)
    assert mirror.messages == before + 1
    assert mirror.keys == {held.key for held in store if held.namespace == NAMESPACE}
    store.discard(name(38))
    feed.stop()
    store.discard(name(37))
    await asyncio.sleep(2 * BATCH_S)
    assert {name(37).key, name(38).key} < mirror.keys


async def test_a_large_store_is_told_in_slices() -> None:
    store, mirror = RamStore(budget_bytes=1 << 26), Mirror()
    one = chunk()
    for number in range(SLICE_KEYS + 1):
        store.put(name(number), one)
    InventoryFeed(store, NAMESPACE, mirror.take).start()
    assert mirror.messages == 2
    assert len(mirror.keys) == SLICE_KEYS + 1
