"""A record in words, and the recount that tests ask for."""

from __future__ import annotations

import numpy as np

from mcp_vllm.store.smart_cache import layout
from mcp_vllm.store.smart_cache.ages import advance
from mcp_vllm.store.smart_cache.eviction import score
from mcp_vllm.store.smart_cache.hazard import DAMPING, ESTIMATE
from mcp_vllm.store.smart_cache.kinds import class_of, is_shared, uses_of
from mcp_vllm.store.smart_cache.layout import COUNTED, HELD, State
from mcp_vllm.store.smart_cache.records import num_ghosts
from mcp_vllm.store.smart_cache.results import Explanation
from mcp_vllm.store.smart_cache.tree import BYTES


def of(state: State, slot: int, now_s: float) -> Explanation:
    """Why the record's block has the score that it has."""
    advance(state, now_s)
    record = state.records[slot]
    kind, bin_ = int(record["kind"]), min(int(record["bin"]), layout.NUM_BINS - 1)
    base = float(state.hazards[ESTIMATE, uses_of(kind), bin_])
    factors = {
        name: float(np.exp(DAMPING * state.tables[ESTIMATE, table, class_of(kind, table), bin_]))
        for table, name in enumerate(layout.TABLES)
        if state.active[table] and not is_shared(kind)
    }
    return Explanation(
        held=bool(record["flags"] & HELD),
        pinned=bool(record["pins"]),
        score=float(score(state, slot)),
        threshold=float(state.seconds[layout.LAST_SCORE]),
        age_s=float(state.seconds[layout.NOW] - record["last_use_s"]) if record["uses"] else 0.0,
        uses=int(record["uses"]),
        turn=int(record["turn"]),
        size_bytes=int(record["size_bytes"]),
        saved_ms=float(record["saved_ms"]),
        hazard=float(1 - np.exp(-base)),
        levels=_levels(kind),
        factors=factors,
    )


def _levels(kind: int) -> dict[str, int]:
    """The levels of a kind by name; of a shared one there are only the uses."""
    if is_shared(kind):
        return {"uses": int(uses_of(kind))}
    levels = np.unravel_index(kind, tuple(layout.LEVELS.values()))
    return dict(zip(layout.LEVELS, map(int, levels), strict=True))


def check(state: State) -> None:
    """Recount a state.

    Raises:
        AssertionError: the accounts and the contents differ.
    """
    records, numbers = state.records, state.numbers
    held = np.flatnonzero(records["flags"] & HELD)
    assert numbers[layout.NUM_HELD] == len(held) <= numbers[layout.MAX_HELD]
    sizes = records["size_bytes"][held].astype(np.int64)
    assert numbers[layout.HELD_BYTES] == sizes.sum() <= numbers[layout.BUDGET_BYTES]
    tenants = np.bincount(records["tenant"][held], sizes, minlength=len(state.tenants[BYTES]))
    assert (tenants == state.tenants[BYTES]).all()
    parents = records["parent"][held]
    children = np.bincount(parents[parents >= 0], minlength=len(records))
    assert (children[held] == records["children"][held]).all()
    leaves = state.leaves[: numbers[layout.NUM_LEAVES]]
    free = held[(children[held] == 0) & (records["pins"][held] == 0)]
    assert sorted(leaves.tolist()) == sorted(free.tolist())
    assert (records["leaf"][leaves] == np.arange(len(leaves))).all()
    named = (state.table >= 0).sum()
    assert num_ghosts(state) + len(held) == named <= numbers[layout.NUM_SLOTS_USED] <= len(records)
    _check_ghosts(state, 0, layout.NUM_STAYING, layout.OLDEST_STAYING, layout.NEWEST_STAYING)
    _check_ghosts(state, 1, layout.NUM_PASSING, layout.OLDEST_PASSING, layout.NEWEST_PASSING)
    _check_ages(state)


def _check_ghosts(state: State, highest_bit: int, number: int, oldest: int, newest: int) -> None:
    slot, before, count = int(state.numbers[oldest]), -1, 0
    while slot >= 0:
        record = state.records[slot]
        assert int(record["fingerprint"]) >> 63 == highest_bit
        assert not record["flags"] & HELD
        assert record["parent"] == before
        before, slot, count = slot, int(record["leaf"]), count + 1
    assert (state.numbers[newest], state.numbers[number]) == (before, count)


def _check_ages(state: State) -> None:
    records = state.records
    for bin_ in range(layout.NUM_BINS + 1):
        slot, inside, before = int(state.queues[0, bin_]), 0, -1
        while slot >= 0:
            assert records[slot]["bin"] == bin_
            assert records[slot]["flags"] & COUNTED
            assert records[slot]["older"] == before
            before, slot, inside = slot, int(records[slot]["younger"]), inside + 1
        assert state.queues[1, bin_] == before
        assert abs(state.hazards[2, :, bin_].sum() - inside) < 1e-6
        own = state.hazards[2, : layout.FIRST_SHARED, bin_].sum()
        assert (abs(state.tables[2, :, :, bin_].sum(axis=1) - own) < 1e-6).all()
