"""SmartCache's promises, whatever is asked of it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_vllm.errors import McpError
from mcp_vllm.store.smart_cache import SmartCache, TurnEnd

Chain = tuple[int, ...]


class Clock:
    """Seconds that only a test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def cache(budget_bytes: int, max_blocks: int = 64, max_ghosts: int = 64) -> SmartCache[int]:
    made: SmartCache[int] = SmartCache(
        budget_bytes, max_blocks, max_ghosts=max_ghosts, clock=Clock()
    )
    return made


def later(made: SmartCache[int], seconds: float) -> None:
    clock = made._clock
    assert isinstance(clock, Clock)
    clock.now_s += seconds


# A block is named by its path, so that keys are chained as real ones are: 3 wide, up to 5 deep.
paths = st.lists(st.integers(1, 3), min_size=1, max_size=5)


def chain_of(path: list[int]) -> Chain:
    names = []
    name = 0
    for step in path:
        name = name * 4 + step
        names.append(name)
    return tuple(names)


EVERY_KEY = {
    key
    for length in range(1, 6)
    for path in itertools.product((1, 2, 3), repeat=length)
    for key in chain_of(list(path))
}

steps = st.lists(
    st.one_of(
        st.tuples(st.just("serve"), paths, st.integers(1, 40), st.sampled_from(["", "a", "b"])),
        st.tuples(st.just("wait"), st.floats(0, 5000)),
        st.tuples(st.just("pin"), paths),
        st.tuples(st.just("unpin"), paths),
        st.tuples(st.just("evict"), paths, st.integers(1, 60)),
        st.tuples(st.just("remove"), paths),
        st.tuples(st.just("resize"), paths, st.integers(1, 30)),
        st.tuples(st.just("finish"), paths),
    ),
    max_size=40,
)


class Owner:
    """Keeps what a store keeps: which blocks it holds, their pins, who is whose child."""

    def __init__(self, made: SmartCache[int]) -> None:
        self.cache = made
        self.held: dict[int, str] = {}
        self.pins: dict[int, int] = {}
        self.log: list[object] = []

    def leave(self, evicted: list[int]) -> None:
        for key in evicted:
            assert not self.pins.get(key), "a pinned block was evicted"
            children = [each for each in self.held if each // 4 == key]
            assert not children, "a block left before its child"
            del self.held[key]
        self.log.append(tuple(evicted))

    def serve(self, path: list[int], size: int, tenant: str) -> None:
        chain = chain_of(path)
        num_held = self.cache.access(chain, num_output_tokens=size)
        leading = next((i for i, key in enumerate(chain) if key not in self.held), len(chain))
        assert num_held == leading
        admission = self.cache.offer(chain, [size] * len(chain), tenant=tenant)
        self.leave(admission.evicted)
        self.held.update(dict.fromkeys(admission.kept, tenant))
        self.log.append(tuple(admission.kept))

    def step(self, name: str, *given: object) -> None:
        act: Callable[..., None] = getattr(self, name)
        act(*given)
        self.cache.check_integrity()
        assert set(self.held) == {key for key in EVERY_KEY if key in self.cache}

    def wait(self, seconds: float) -> None:
        later(self.cache, seconds)

    def pin(self, path: list[int]) -> None:
        keys = [key for key in chain_of(path) if key in self.held]
        self.cache.pin(keys)
        for key in keys:
            self.pins[key] = self.pins.get(key, 0) + 1

    def unpin(self, path: list[int]) -> None:
        keys = [key for key in chain_of(path) if self.pins.get(key)]
        self.cache.unpin(keys)
        for key in keys:
            self.pins[key] -= 1

    def evict(self, path: list[int], size: int) -> None:
        chain = chain_of(path)
        before = set(self.held)
        left = self.cache.evict(size, protected=chain)
        if left is None:
            assert before == {key for key in self.held if key in self.cache}
            return
        assert before.intersection(chain).isdisjoint(left)
        self.leave(left)
        assert self.cache.held_bytes + size <= self.cache.budget_bytes

    def remove(self, path: list[int]) -> None:
        """A leaf's bytes proved bad."""
        key = chain_of(path)[-1]
        if key in self.held and not any(each // 4 == key for each in self.held):
            self.cache.remove(key)
            del self.held[key]
            self.pins.pop(key, None)

    def resize(self, path: list[int], size: int) -> None:
        key = chain_of(path)[-1]
        if not any(self.pins.values()):
            self.leave(self.cache.resize(key, size))

    def finish(self, path: list[int]) -> None:
        self.cache.access(
            chain_of(path), num_output_tokens=7, ended_by=TurnEnd.TOOL_CALL, since_s=0.0
        )


def run(script: list[tuple[object, ...]]) -> list[object]:
    made = cache(budget_bytes=200, max_blocks=12, max_ghosts=20)
    made.set_quota("b", 60)
    owner = Owner(made)
    for name, *given_ in script:
        owner.step(str(name), *given_)
    return owner.log


@settings(max_examples=40, deadline=None)
@given(steps)
def test_no_call_breaks_budget_quota_pins_or_the_order_of_chains(
    script: list[tuple[object, ...]],
) -> None:
    run(script)


@settings(max_examples=10, deadline=None)
@given(steps)
def test_equal_calls_decide_equally(script: list[tuple[object, ...]]) -> None:
    assert run(script) == run(script)


def fill(made: SmartCache[int], count: int, size: int = 1) -> list[int]:
    keys = list(range(1000, 1000 + count))
    for key in keys:
        made.access([key])
        made.offer([key], [size])
        later(made, 1.0)
    return keys


def test_the_order_of_leaving_is_total() -> None:
    made = cache(1000, 50, 50)
    fill(made, 40)
    order: list[int] = []
    while len(made):
        left = made.evict(made.budget_bytes - made.held_bytes + 1)
        assert left is not None
        order += left
    assert len(order) == len(set(order)) == 40


def test_a_cache_full_of_pins_refuses_and_changes_nothing() -> None:
    made = cache(10)
    keys = fill(made, 10)
    made.pin(keys)
    assert made.evict(1) is None
    admission = made.offer([1, 2], [1, 1])
    assert (admission.kept, admission.evicted) == ([], [])
    assert all(key in made for key in keys)
    made.check_integrity()


def test_a_block_larger_than_the_budget_is_refused_with_its_children() -> None:
    made = cache(10)
    admission = made.offer([1, 2, 3], [4, 11, 1])
    assert (admission.kept, admission.evicted) == ([1], [])


def test_insert_without_room_says_what_to_do() -> None:
    made = cache(10)
    made.insert(1, 10)
    with pytest.raises(McpError, match=r"call evict\(\) first"):
        made.insert(2, 1)
    assert made.evict(1) == [1]
    made.insert(2, 1)
    assert 2 in made


def test_a_tenant_over_its_quota_loses_its_own_blocks_only() -> None:
    made = cache(100)
    made.set_quota("loud", 10)
    made.offer([1, 2, 3], [10, 10, 10], tenant="calm")
    for key in range(100, 130):
        made.access([key])
        made.offer([key], [5], tenant="loud")
        later(made, 1.0)
    assert all(key in made for key in (1, 2, 3))
    assert sum(key in made for key in range(100, 130)) == 2


def test_a_request_told_twice_counts_once() -> None:
    made = cache(100)
    made.access([1, 2])
    made.access([1, 2, 3], num_output_tokens=50, since_s=0.0)
    later(made, 60.0)
    made.access([1, 2, 3, 4])
    first, answer = made.explain(1), made.explain(3)
    assert first is not None
    assert answer is not None
    assert (first.uses, answer.uses, first.turn) == (2, 2, 2)


def test_a_block_that_comes_back_outlasts_those_that_do_not() -> None:
    made = cache(20, 20, 2000)
    fresh = iter(range(10_000, 100_000))
    for _ in range(400):
        made.access([1, 2])
        made.offer([1, 2], [1, 1])
        later(made, 10.0)
        for _ in range(30):
            once = next(fresh)
            made.access([once])
            made.offer([once], [1])
            later(made, 1.0)
    assert 2 in made
    kept, gone = made.explain(2), made.explain(once)
    assert kept is not None
    assert gone is not None
    assert kept.score > gone.score


def test_a_block_that_saves_more_a_byte_outlasts_its_equal() -> None:
    made = cache(1000, 50, 50)
    made.offer([1], [10], [5.0])
    made.offer([2], [10], [50.0])
    made.offer([3], [1], [5.0])
    made.access([1]), made.access([2]), made.access([3])
    assert made.evict(made.budget_bytes - made.held_bytes + 1) == [1]


def test_an_evicted_block_is_explained_from_its_ghost() -> None:
    made = cache(3)
    fill(made, 6)
    gone = next(key for key in range(1000, 1006) if key not in made)
    explanation = made.explain(gone)
    assert explanation is not None
    assert not explanation.held
    assert explanation.levels["uses"] == 0
    assert set(explanation.factors) == {"new, turn, last", "output, ended, last", "tail"}
    assert made.explain(5) is None


def test_ghosts_are_bounded() -> None:
    made = cache(5, 5, 30)
    fill(made, 300)
    assert made.num_ghosts <= 30
    made.check_integrity()


def learned() -> SmartCache[int]:
    made = cache(40, 40, 4000)
    for i in range(3000):
        chain = [1, 2, 3] if i % 3 == 0 else [100 + i, 10_000 + i]
        made.access(chain)
        made.offer(chain, [1] * len(chain))
        later(made, 5.0)
    return made


def test_what_was_learned_survives_a_restart() -> None:
    before = learned()
    after = cache(40, 40, 4000)
    later(after, 1e6)
    after.restore(before.save())
    assert len(after) == 0
    old, new = before.explain(3), after.explain(3)
    assert old is not None
    assert new is not None
    assert (new.uses, new.turn, new.levels) == (old.uses, old.turn, old.levels)
    assert new.age_s == pytest.approx(old.age_s, abs=1e-3)
    assert new.hazard == pytest.approx(old.hazard, rel=0.2)
    assert after.access([1, 2, 3]) == 0
    assert set(after.offer([1, 2, 3], [1, 1, 1]).kept) == {1, 2, 3}
    after.check_integrity()


@pytest.mark.parametrize("harm", [b"", b"\0" * 100, "flip", "cut", "grow"])
def test_a_damaged_image_is_refused_and_nothing_changes(harm: bytes | str) -> None:
    image = bytearray(learned().save())
    if harm == "flip":
        image[len(image) // 2] ^= 1
    elif harm == "cut":
        del image[-1000:]
    elif harm == "grow":
        image += bytes(1000)
    else:
        assert isinstance(harm, bytes)
        image = bytearray(harm)
    made = cache(10)
    with pytest.raises(McpError, match="delete it"):
        made.restore(bytes(image))
    assert made.explain(3) is None
    made.check_integrity()


@pytest.mark.parametrize("way", ["offer", "insert"])
def test_blocks_that_no_request_asked_for_first_do_not_outgrow_the_ghosts(way):
    made = cache(budget_bytes=4, max_blocks=4, max_ghosts=8)
    for number in range(100):
        if way == "offer":
            made.offer([number], [1])
        else:
            assert made.evict(1) is not None
            made.insert(number, 1)
        assert made.num_ghosts <= 8
        made.check_integrity()


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), max_size=20))
def test_blocks_whose_chains_contradict_each_other_can_leave_all_the_same(chains):
    made = cache(10_000)
    for chain in chains:
        made.access(chain)
        made.offer(chain, [100] * len(chain))
    assert made.evict(10_000, 64) is not None
    assert len(made) == 0
    made.check_integrity()


def test_of_what_left_long_ago_one_in_two_is_remembered_and_of_what_left_lately_all():
    made = cache(budget_bytes=4, max_blocks=4, max_ghosts=900)
    keys = fill(made, 10_000)
    assert 890 < made.num_ghosts <= 900
    made.check_integrity()
    lately, before = keys[-150:], keys[-1400:-400]
    assert all(made.explain(key) for key in lately)
    remembered = sum(made.explain(key) is not None for key in before)
    assert 0.45 < remembered / len(before) < 0.55


def test_what_was_forgotten_of_a_chain_follows_from_what_is_remembered_of_it():
    made = cache(budget_bytes=4, max_blocks=4, max_ghosts=900)
    chain = list(range(100))
    made.access(chain)
    later(made, 1.0)
    made.access(chain)
    later(made, 1.0)
    fill(made, 1000)
    known = [made.explain(key) is not None for key in chain]
    assert 30 < sum(known) < 70
    made.access(chain)
    deepest = max(key for key in chain if known[key])
    for key in chain:
        explained = made.explain(key)
        assert explained is not None
        assert (explained.uses, explained.turn) == (3 if key <= deepest else 1, 3)
    made.check_integrity()


def test_what_a_request_used_is_known_when_it_is_offered_however_long_its_chain():
    made = cache(budget_bytes=160, max_blocks=160, max_ghosts=160)
    fill(made, 400)
    chain = list(range(50))
    made.access(chain)
    made.offer(chain, [1] * 50)
    explained = [made.explain(key) for key in chain]
    assert [each and each.uses for each in explained] == [1] * 50
    made.check_integrity()


def test_a_chain_that_is_known_displaces_no_ghosts():
    made = cache(budget_bytes=4, max_blocks=4, max_ghosts=40)
    chain = list(range(20))
    made.access(chain)
    others = list(range(1000, 1015))
    for key in others:
        made.access([key])
    made.access(chain)
    assert all(made.explain(key) for key in (*chain, *others))


def test_a_chain_that_contradicts_another_lends_its_uses_only_to_what_is_unknown():
    made = cache(10)
    made.access([1])
    for _ in range(50):
        made.access([7])
    made.access([1, 7])
    explained = made.explain(1)
    assert explained is not None
    assert explained.uses == 2


def test_a_forgotten_block_inherits_from_one_that_this_request_has_used_already():
    made = cache(budget_bytes=4, max_blocks=4, max_ghosts=900)
    chain = list(range(100))
    for _ in range(5):
        made.access(chain)
        later(made, 1.0)
    began_s = made._clock()
    made.access(chain)
    later(made, 1.0)
    fill(made, 1000)
    known = [made.explain(key) is not None for key in chain]
    made.access(chain, since_s=began_s)
    deepest = max(key for key in chain if known[key])
    uses = [made.explain(key).uses for key in chain[: deepest + 1]]
    assert uses == [6] * (deepest + 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_ghosts_whose_children_are_held_never_cost_a_record_that_is_not_there(seed):
    made = cache(budget_bytes=20, max_blocks=20, max_ghosts=40)
    rng = random.Random(seed)
    pinned = []
    for number in range(60):
        parent, child = 10_000 + 2 * number, 10_001 + 2 * number
        made.access([parent, child])
        made.offer([parent, child], [1, 1])
        if len(pinned) < 15 and child in made and rng.random() < 0.7:
            made.pin([child])
            pinned.append(child)
            made.remove(parent)
        made.check_integrity()
    for _ in range(4):
        chain = [rng.randrange(1 << 40) for _ in range(rng.randrange(1, 60))]
        made.access(chain)
        made.offer(chain, [1] * len(chain))
        made.check_integrity()
    assert all(child in made for child in pinned)


def test_a_cache_that_may_remember_nothing_is_refused():
    with pytest.raises(McpError, match="max_ghosts"):
        cache(10, max_ghosts=0)
