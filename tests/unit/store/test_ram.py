from collections import OrderedDict

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mcp_vllm.codec import ChunkLayout
from mcp_vllm.store.ram import ENTRY_OVERHEAD_BYTES, Chunk, ChunkKey, RamStore

LAYOUT = ChunkLayout("u8")
BUDGET_BYTES = 8 * (ENTRY_OVERHEAD_BYTES + 300)

numbers = st.integers(0, 15)
sizes = st.integers(1, 600)


def name_of(number: int) -> ChunkKey:
    return ChunkKey(b"namespace", number.to_bytes(8, "big"))


def raw_chunk(size: int) -> Chunk:
    return Chunk(LAYOUT, size, raw=np.zeros(size, np.uint8))


class StoreAgainstModel(RuleBasedStateMachine):
    """The model: names in order of last use, with the bytes that each holds."""

    def __init__(self) -> None:
        super().__init__()
        self.store = RamStore(BUDGET_BYTES)
        self.model: OrderedDict[ChunkKey, int] = OrderedDict()
        self.raw: list[ChunkKey] = []
        self.evictions = 0

    def shrink_model(self, limit_bytes: int) -> None:
        while sum(self.model.values()) > limit_bytes:
            name, _ = self.model.popitem(last=False)
            self.evictions += 1
            if name in self.raw:
                self.raw.remove(name)

    @rule(number=numbers, size=sizes, is_raw=st.booleans())
    def put(self, number: int, size: int, is_raw: bool) -> None:
        name = name_of(number)
        chunk = raw_chunk(size) if is_raw else Chunk(LAYOUT, 2 * size, frame=bytes(size))
        assert self.store.put(name, chunk)
        if name in self.model:
            self.model.move_to_end(name)
            return
        self.shrink_model(BUDGET_BYTES - size - ENTRY_OVERHEAD_BYTES)
        self.model[name] = size + ENTRY_OVERHEAD_BYTES
        if is_raw:
            self.raw.append(name)

    @rule(number=numbers)
    def put_what_can_never_fit(self, number: int) -> None:
        name = name_of(number)
        present = name in self.model
        assert self.store.put(name, raw_chunk(BUDGET_BYTES)) is present
        if present:
            self.model.move_to_end(name)

    @rule(chain=st.lists(numbers, unique=True))
    def touch(self, chain: list[int]) -> None:
        self.store.touch(name_of(number) for number in chain)
        for number in reversed(chain):
            if name_of(number) in self.model:
                self.model.move_to_end(name_of(number))

    @rule(size=st.integers(1, BUDGET_BYTES))
    def encode_what_waited_longest(self, size: int) -> None:
        waiting = self.store.next_raw()
        assert (waiting and waiting[0]) == (self.raw[0] if self.raw else None)
        if waiting is None:
            return
        name, chunk = waiting
        self.store.set_frame(name, chunk, bytes(size))
        self.raw.remove(name)
        self.model[name] = size + ENTRY_OVERHEAD_BYTES
        self.shrink_model(BUDGET_BYTES)

    @rule(number=numbers)
    def discard(self, number: int) -> None:
        self.store.discard(name_of(number))
        self.model.pop(name_of(number), None)
        if name_of(number) in self.raw:
            self.raw.remove(name_of(number))

    @rule(number=numbers)
    def set_the_frame_of_a_chunk_that_was_replaced(self, number: int) -> None:
        self.store.set_frame(name_of(number), raw_chunk(1), b"stale")

    @invariant()
    def agrees(self) -> None:
        self.store.check_integrity()
        assert list(self.store._chunks) == list(self.model)
        size = self.store.size()
        assert size.held_bytes == sum(self.model.values()) <= size.budget_bytes
        assert size.raw_held_bytes == sum(self.model[name] for name in self.raw)
        assert (len(self.store), self.store.evictions) == (len(self.model), self.evictions)
        assert all((name_of(n) in self.store) == (name_of(n) in self.model) for n in range(16))


TestStoreAgainstModel = StoreAgainstModel.TestCase
TestStoreAgainstModel.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)


def test_a_chain_loses_its_end_first_and_its_beginning_last() -> None:
    held = ENTRY_OVERHEAD_BYTES + 100
    store = RamStore(6 * held)
    chain = [name_of(number) for number in range(6)]
    for name in chain:
        store.put(name, raw_chunk(100))
    store.touch(chain)
    for newcomer in range(100, 106):
        store.put(name_of(newcomer), raw_chunk(100))
        left = [name for name in chain if name in store]
        assert left == chain[: len(left)]


def test_touching_one_chain_lets_the_other_leave_first() -> None:
    held = ENTRY_OVERHEAD_BYTES + 100
    store = RamStore(4 * held)
    old, fresh = [name_of(0), name_of(1)], [name_of(2), name_of(3)]
    for name in [*fresh, *old]:
        store.put(name, raw_chunk(100))
    store.touch(old)
    store.touch(fresh)
    store.put(name_of(9), raw_chunk(100 + held))
    assert [name in store for name in [*old, *fresh]] == [False, False, True, True]
