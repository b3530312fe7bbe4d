import itertools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mcp_vllm.codec import ChunkLayout
from mcp_vllm.store.chunk_policy import ChunkPolicy
from mcp_vllm.store.ram import ENTRY_OVERHEAD_BYTES, Chunk, ChunkKey, RamStore

LAYOUT = ChunkLayout("u8")
BUDGET_BYTES = 8 * (ENTRY_OVERHEAD_BYTES + 300)

numbers = st.integers(0, 15)
sizes = st.integers(1, 600)


def name_of(number: int) -> ChunkKey:
    return ChunkKey(b"namespace", number.to_bytes(8, "big"))


def raw_chunk(size: int) -> Chunk:
    return Chunk(LAYOUT, size, raw=np.zeros(size, np.uint8))


def store_of(budget_bytes: int, max_ghosts: int = 64) -> RamStore:
    """By a clock that goes a second further at each look."""
    seconds = itertools.count()
    policy = ChunkPolicy(budget_bytes, max_ghosts=max_ghosts, clock=lambda: float(next(seconds)))
    return RamStore(budget_bytes, policy)


class StoreAgainstModel(RuleBasedStateMachine):
    """The model: the bytes that each name takes, and raw ones in the order in which they came.
    Which leave is the policy's word; when, and what is told of it, is the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.store = store_of(BUDGET_BYTES)
        self.store.watchers.append(self.told)
        self.model: dict[ChunkKey, int] = {}
        self.raw: list[ChunkKey] = []
        self.known: set[ChunkKey] = set()
        self.left: list[ChunkKey] = []
        self.evictions = 0

    def told(self, name: ChunkKey, present: bool) -> None:
        assert (name in self.store) == present != (name in self.known)
        (self.known.add if present else self.known.remove)(name)
        if not present:
            self.left.append(name)

    def leave(self, need_bytes: int) -> None:
        """What the store has no more left because so many bytes were needed."""
        gone = [name for name in self.left if name in self.model and name not in self.store]
        held = sum(self.model.values())
        assert bool(gone) == (held + need_bytes > BUDGET_BYTES)
        for name in gone:
            assert held + need_bytes > BUDGET_BYTES, "more left than had to"
            held -= self.model.pop(name)
            if name in self.raw:
                self.raw.remove(name)
        self.evictions += len(gone)

    @rule(number=numbers, size=sizes, is_raw=st.booleans())
    def put(self, number: int, size: int, is_raw: bool) -> None:
        name = name_of(number)
        chunk = raw_chunk(size) if is_raw else Chunk(LAYOUT, 2 * size, frame=bytes(size))
        assert self.store.put(name, chunk)
        if name in self.model:
            return
        self.leave(chunk.held_bytes)
        self.model[name] = chunk.held_bytes
        if is_raw:
            self.raw.append(name)

    @rule(number=numbers, size=sizes)
    def offer(self, number: int, size: int) -> None:
        name = name_of(number)
        kept = self.store.offer(name, Chunk(LAYOUT, 2 * size, frame=bytes(size)))
        assert kept == (name in self.store)
        if kept and name not in self.model:
            self.leave(size + ENTRY_OVERHEAD_BYTES)
            self.model[name] = size + ENTRY_OVERHEAD_BYTES
        elif not kept:
            gone = [each for each in self.model if each not in self.store]
            self.evictions += len(gone)
            for each in gone:
                del self.model[each]
                if each in self.raw:
                    self.raw.remove(each)

    @rule(number=numbers)
    def put_what_can_never_fit(self, number: int) -> None:
        name = name_of(number)
        assert self.store.put(name, raw_chunk(BUDGET_BYTES)) is (name in self.model)

    @rule(chain=st.lists(numbers, unique=True))
    def touch(self, chain: list[int]) -> None:
        self.store.touch([name_of(number) for number in chain])

    @rule(size=st.integers(1, BUDGET_BYTES))
    def encode_what_waited_longest(self, size: int) -> None:
        waiting = self.store.next_raw()
        assert (waiting and waiting[0]) == (self.raw[0] if self.raw else None)
        if waiting is None:
            return
        name, chunk = waiting
        before = self.model.pop(name)
        self.raw.remove(name)
        self.store.set_frame(name, chunk, bytes(size))
        if size + ENTRY_OVERHEAD_BYTES > BUDGET_BYTES:
            assert name not in self.store, "it fits nowhere"
            return
        self.leave(size + ENTRY_OVERHEAD_BYTES)
        assert before
        self.model[name] = size + ENTRY_OVERHEAD_BYTES

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
        self.left.clear()
        assert set(self.store) == set(self.model) == self.known
        size = self.store.size()
        assert size.held_bytes == sum(self.model.values()) <= size.budget_bytes
        assert size.raw_held_bytes == sum(self.model[name] for name in self.raw)
        assert (len(self.store), self.store.evictions) == (len(self.model), self.evictions)


TestStoreAgainstModel = StoreAgainstModel.TestCase
TestStoreAgainstModel.settings = settings(
    max_examples=15, stateful_step_count=40, deadline=None, derandomize=True
)


def test_a_chain_loses_its_end_first_and_its_beginning_last() -> None:
    held = ENTRY_OVERHEAD_BYTES + 100
    store = store_of(6 * held)
    chain = [name_of(number) for number in range(6)]
    for name in chain:
        store.put(name, raw_chunk(100))
    store.touch(chain)
    for newcomer in range(100, 106):
        store.put(name_of(newcomer), raw_chunk(100))
        left = [name for name in chain if name in store]
        assert left == chain[: len(left)]


def test_what_comes_back_stays_when_prompts_that_do_not_pass_through() -> None:
    held = ENTRY_OVERHEAD_BYTES + 100
    store, hits = store_of(16 * held, max_ghosts=1000), 0
    chats = [[name_of(10 * chat + at) for at in range(3)] for chat in range(2)]
    for number in range(300):
        once = [name_of(1000 + 8 * number + at) for at in range(8)]
        if number >= 100:
            hits += sum(name in store for name in chats[number % 2])
        for chain in (chats[number % 2], once):
            for name in chain:
                assert store.put(name, raw_chunk(100))
            store.touch(chain, num_output_tokens=10)
    assert hits > 0.9 * 3 * 200  # least recently used first, there would be none


def test_chunks_of_a_request_do_not_push_each_other_out_before_it_ends() -> None:
    held = ENTRY_OVERHEAD_BYTES + 100
    store = store_of(20 * held)
    for number in range(20):
        store.put(name_of(number), raw_chunk(100))
        store.touch([name_of(number)])
    coming = [name_of(100 + at) for at in range(5)]
    for name in reversed(coming):  # as an engine's are committed
        assert store.put(name, raw_chunk(100))
    assert all(name in store for name in coming)


def test_a_promoted_chunk_that_is_worth_less_than_all_here_is_not_kept() -> None:
    held = ENTRY_OVERHEAD_BYTES + 100
    store = store_of(4 * held)
    hot = [name_of(at) for at in range(4)]
    for name in hot:
        store.put(name, raw_chunk(100))
    for _ in range(200):
        store.touch(hot)
    cold = Chunk(LAYOUT, 100_000, frame=bytes(3 * 100))
    assert not store.offer(name_of(9), cold)
    assert set(store) == set(hot)
