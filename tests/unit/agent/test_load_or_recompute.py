"""The decision between loading and computing: what it picks, and what it can cost at worst."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_vllm.agent.load_or_recompute import (
    ChainGroup,
    Progress,
    decide,
    load_seconds,
    shares,
    should_give_up,
    slack_s,
)
from mcp_vllm.link.prefill import PrefillCost

PREFILL = PrefillCost(step_s=0.01, token_s=1e-3, context_s=0.0, step_tokens=2048)
CHUNK_TOKENS, CHUNK_BYTES = 128, 400_000
LOOKUP_S = 0.05


@dataclass(frozen=True)
class At:
    """A source of that speed and latency."""

    bytes_s: float
    latency_s: float = 0.0

    def seconds(self, raw_bytes: int, num_chunks: int) -> float:
        return self.latency_s + raw_bytes / self.bytes_s


STORE, FAST, SLOW = At(1e9), At(50e6, 0.001), At(0.25e6, 0.02)


def whole(*sources) -> ChainGroup:
    return ChainGroup(CHUNK_TOKENS, 0, CHUNK_BYTES, sources)


def window(*sources, chunks: int = 4) -> ChainGroup:
    return ChainGroup(CHUNK_TOKENS, chunks, CHUNK_BYTES, sources)


def test_a_fast_link_loads_and_a_slow_one_computes():
    assert decide([whole(*[FAST] * 16)], PREFILL).choice == "load"
    slow = decide([whole(*[SLOW] * 16)], PREFILL)
    assert (slow.choice, slow.end_tokens, slow.reach_tokens) == ("recompute", 0, 16 * 128)
    assert slow.recompute_s == pytest.approx(0.01 + 2.048)


def test_what_is_here_is_loaded_and_what_is_far_away_computed():
    decision = decide([whole(*[STORE] * 10, *[SLOW] * 6)], PREFILL)
    assert (decision.choice, decision.end_tokens) == ("partial", 10 * 128)


def test_what_lies_behind_a_hole_does_not_count():
    decision = decide([whole(*[FAST] * 3, None, *[FAST] * 8)], PREFILL)
    assert (decision.choice, decision.reach_tokens) == ("load", 3 * 128)


def test_nothing_to_load_is_no_decision():
    assert decide([whole(None, FAST)], PREFILL) is None
    assert decide([whole()], PREFILL) is None


def test_a_sliding_window_needs_only_its_end():
    groups = [whole(*[FAST] * 16), window(*[None] * 12, *[FAST] * 4)]
    decision = decide(groups, PREFILL)
    assert (decision.choice, decision.reach_tokens) == ("load", 16 * 128)
    assert shares(groups, 16 * 128) == {FAST: (20 * CHUNK_BYTES, 20)}


def test_a_prefix_ends_where_every_window_is_whole():
    """Turns that ended after chunks 6 and 12 left their windows; the far end's is damaged."""
    held = [FAST if 2 <= at < 6 or 8 <= at < 12 else None for at in range(16)]
    groups = [whole(*[FAST] * 16), window(*held), window(*held, chunks=2)]
    assert decide(groups, PREFILL).reach_tokens == 12 * 128
    held[9] = None
    assert decide([*groups[:1], window(*held)], PREFILL).reach_tokens == 6 * 128


def test_a_part_of_a_hybrid_context_ends_at_a_whole_window_too():
    held = [STORE if 2 <= at < 6 else SLOW if 8 <= at < 12 else None for at in range(12)]
    decision = decide([whole(*[STORE] * 8, *[SLOW] * 4), window(*held)], PREFILL)
    assert (decision.choice, decision.end_tokens) == ("partial", 6 * 128)


def test_a_choice_does_not_flap():
    even = At(16 * CHUNK_BYTES / 2.0)  # as quick as computing, or nearly
    assert decide([whole(*[even] * 16)], PREFILL).choice == "load"
    assert decide([whole(*[even] * 16)], PREFILL, returning=True).choice == "recompute"
    assert decide([whole(*[FAST] * 16)], PREFILL, returning=True).choice == "load"


SOURCES = st.sampled_from([STORE, FAST, SLOW, At(5e6, 0.1), None])
CHAINS = st.lists(SOURCES, max_size=40)


@given(CHAINS, CHAINS, st.integers(0, 6), st.booleans())
def test_no_choice_is_expected_to_be_slower_than_computing(first, second, chunks, returning):
    groups = [whole(*first), window(*second, chunks=chunks)]
    decision = decide(groups, PREFILL, returning=returning)
    if decision is None:
        return
    assert 0 <= decision.end_tokens <= decision.reach_tokens
    if decision.end_tokens:
        for group, sources in zip(groups, (first, second), strict=True):
            needed = group.needed(decision.end_tokens)
            assert needed.stop <= len(sources)
            assert None not in sources[needed.start : needed.stop]
        taken = load_seconds(shares(groups, decision.end_tokens))
        rest = PREFILL.seconds(decision.end_tokens, decision.reach_tokens)
        assert taken + rest == pytest.approx(decision.load_s)
        assert decision.load_s <= decision.recompute_s


TICK_S = 0.01


def finish_s(rates, chunks: int, usable: bool, sure: bool) -> tuple[float, float]:
    """How long a request takes that loads `chunks` while its link carries `rates[i]` bytes in
    second i, and computes what it has given up; and how long it takes to compute all.

    `usable`: what has come is a prefix that can be used. The first estimate is a gigabit.
    """
    end = chunks * CHUNK_TOKENS
    all_s = PREFILL.seconds(0, end)
    slack = slack_s(all_s, LOOKUP_S)
    total = chunks * CHUNK_BYTES
    come = elapsed_s = idle_s = 0.0
    seen = 125e6
    while come < total:
        rate = rates[min(int(elapsed_s), len(rates) - 1)]
        rest_s = PREFILL.seconds(int(come // CHUNK_BYTES) * CHUNK_TOKENS if usable else 0, end)
        remaining_s = (total - come) / max(seen, 1.0)
        progress = Progress(elapsed_s, idle_s, remaining_s, rest_s, all_s, sure)
        if should_give_up(progress, slack):
            return elapsed_s + rest_s, all_s
        elapsed_s += TICK_S
        come += rate * TICK_S
        seen = rate
        idle_s = 0.0 if rate else idle_s + TICK_S
    return elapsed_s, all_s


CHUNKS = st.integers(1, 60)


def bound_s(all_s: float) -> float:
    return 1.1 * all_s + LOOKUP_S + TICK_S


@given(st.floats(0, 1e9), CHUNKS, st.booleans(), st.booleans())
def test_a_link_of_any_speed_costs_at_most_a_tenth_and_the_lookup(rate, chunks, usable, sure):
    taken_s, all_s = finish_s([rate], chunks, usable, sure)
    assert taken_s <= bound_s(all_s)


@given(st.lists(st.floats(0, 1e8), min_size=1, max_size=12), CHUNKS)
def test_a_link_that_changes_costs_no_more_where_what_has_come_is_of_use(rates, chunks):
    taken_s, all_s = finish_s(rates, chunks, usable=True, sure=False)
    # Of a chunk that was under way when the link broke, nothing is of use.
    assert taken_s <= bound_s(all_s) + PREFILL.seconds(0, CHUNK_TOKENS)


def test_a_load_that_pays_is_not_given_up():
    for usable in (True, False):
        taken_s, all_s = finish_s([10e6], 30, usable, sure=False)
        assert taken_s == pytest.approx(30 * CHUNK_BYTES / 10e6, abs=0.02)
        assert taken_s < all_s / 2


def test_a_load_that_is_nearly_there_is_not_given_up():
    nearly = Progress(0.84, 0.1, remaining_s=0.02, rest_s=0.77, all_s=0.77, is_sure=False)
    assert not should_give_up(nearly, 0.5)
    assert should_give_up(nearly, 0.05)  # neither is within the bound: what is left is to stop
