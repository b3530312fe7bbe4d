"""Who leaves: the leaf that scores least of a sample, then its chain while that is no better.

A sample of leaves, as in Redis and LHD (Beckmann et al., NSDI '18), costs the same at any size of
the cache, and the score may change with time, which no ordered structure would follow. The
generator is the state's own, so a replay decides the same. Few leaves are looked at one and all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mcp_vllm.store.smart_cache.hazard import index_of
from mcp_vllm.store.smart_cache.layout import (
    BUDGET_BYTES,
    EVICTIONS,
    HELD_BYTES,
    LAST_SCORE,
    MAX_HELD,
    NUM_HELD,
    NUM_LEAVES,
    PROTECTED,
    RANDOM,
    State,
    step,
)
from mcp_vllm.store.smart_cache.tree import BYTES, FIRST, LAST, QUOTA, hold, release

SAMPLE = 64
TENANT_SAMPLE = 16  # from either end of a tenant's leaves


@step
def score(state: State, slot: int) -> float:
    """Expected saved milliseconds for a byte held for a second."""
    record = state.records[slot]
    rate = index_of(state, int(record.kind), int(record.bin))
    return rate * float(record.saved_ms) / max(1, record.size_bytes)


@step
def goes_before(state: State, slot: int, other: int) -> bool:
    """The total order of leaving: lower score, then longer unused, then the lower slot."""
    mine, theirs = score(state, slot), score(state, other)
    if mine != theirs:
        return mine < theirs
    my_use, their_use = state.records[slot].last_use_s, state.records[other].last_use_s
    if my_use != their_use:
        return my_use < their_use
    return slot < other


@step
def make_room(state: State, size_bytes: int, num_blocks: int, victims: NDArray[np.int32]) -> int:
    """Evict until so many bytes and blocks are free.

    Args:
        victims: int32, shape (2, slots): receives slots, children first, and their parents.

    Returns:
        how many were evicted, or -1 when there is no room; then nothing was changed.
    """
    num_victims = 0
    while (
        state.numbers[HELD_BYTES] + size_bytes > state.numbers[BUDGET_BYTES]
        or state.numbers[NUM_HELD] + num_blocks > state.numbers[MAX_HELD]
    ):
        slot = _pick(state)
        if slot < 0:
            return _undo(state, victims, num_victims)
        num_victims = _evict_chain(state, slot, size_bytes, num_blocks, victims, num_victims)
    state.numbers[EVICTIONS] += num_victims
    return num_victims


@step
def make_tenant_room(state: State, tenant: int, size_bytes: int, victims: NDArray[np.int32]) -> int:
    """Evict this tenant's blocks until so many bytes fit into its quota; as `make_room`."""
    num_victims = 0
    while state.tenants[BYTES, tenant] + size_bytes > state.tenants[QUOTA, tenant]:
        slot = _pick_of_tenant(state, tenant)
        if slot < 0:
            return _undo(state, victims, num_victims)
        num_victims = _evict(state, slot, victims, num_victims)
    state.numbers[EVICTIONS] += num_victims
    return num_victims


@step
def _evict_chain(
    state: State,
    slot: int,
    size_bytes: int,
    num_blocks: int,
    victims: NDArray[np.int32],
    num_victims: int,
) -> int:
    limit = score(state, slot)
    while True:
        parent = state.records[slot].parent
        num_victims = _evict(state, slot, victims, num_victims)
        fits = (
            state.numbers[HELD_BYTES] + size_bytes <= state.numbers[BUDGET_BYTES]
            and state.numbers[NUM_HELD] + num_blocks <= state.numbers[MAX_HELD]
        )
        if fits or parent < 0 or state.records[parent].leaf < 0:
            return num_victims
        if state.records[parent].flags & PROTECTED or score(state, parent) > limit:
            return num_victims
        slot = parent


@step
def _evict(state: State, slot: int, victims: NDArray[np.int32], num_victims: int) -> int:
    state.seconds[LAST_SCORE] = score(state, slot)
    victims[0, num_victims] = slot
    victims[1, num_victims] = state.records[slot].parent
    release(state, slot)
    return num_victims + 1


@step
def _undo(state: State, victims: NDArray[np.int32], num_victims: int) -> int:
    for i in range(num_victims - 1, -1, -1):
        hold(state, victims[0, i], victims[1, i])
    return -1


@step
def _pick(state: State) -> int:
    num_leaves = state.numbers[NUM_LEAVES]
    best = -1
    if num_leaves > SAMPLE:
        for _ in range(SAMPLE):
            slot = state.leaves[_random(state) % num_leaves]
            if state.records[slot].flags & PROTECTED:
                continue
            if best < 0 or goes_before(state, slot, best):
                best = slot
    if best < 0:
        for place in range(num_leaves):
            slot = state.leaves[place]
            if state.records[slot].flags & PROTECTED:
                continue
            if best < 0 or goes_before(state, slot, best):
                best = slot
    return best


@step
def _pick_of_tenant(state: State, tenant: int) -> int:
    best = -1
    for end in (FIRST, LAST):
        slot = state.tenants[end, tenant]
        looked_at = 0
        while slot >= 0 and (looked_at < TENANT_SAMPLE or best < 0):
            if not state.records[slot].flags & PROTECTED and (
                best < 0 or goes_before(state, slot, best)
            ):
                best = slot
            looked_at += 1
            record = state.records[slot]
            slot = record.tenant_after if end == FIRST else record.tenant_before
    return best


@step
def _random(state: State) -> int:
    """A step of xorshift64 (Marsaglia 2003), as a number that is not negative."""
    bits = np.uint64(state.numbers[RANDOM])
    bits ^= bits << np.uint64(13)
    bits ^= bits >> np.uint64(7)
    bits ^= bits << np.uint64(17)
    state.numbers[RANDOM] = np.int64(bits)
    return int(bits >> np.uint64(2))
