"""Slots, their names, and the ghosts: which record stands for which block.

One ghost in two, by its fingerprint, *stays*; the others *pass*: where ghosts are too many and more
than an eighth of them pass, the oldest of these go first. Who comes back late is counted by those
that stay, a fair sample, and what the other blocks of a chain were follows from them (`use.py`).

Steps of `SmartCache`; each takes its `State` and changes it in place.
"""

from __future__ import annotations

import numpy as np

from mcp_vllm.store.smart_cache.ages import leave_bin
from mcp_vllm.store.smart_cache.layout import (
    COUNTED,
    FREE_SLOT,
    HELD,
    MAX_GHOSTS,
    NEWEST_GHOST,
    NEWEST_PASSING,
    NUM_GHOSTS,
    NUM_PASSING,
    NUM_SLOTS_USED,
    OLDEST_GHOST,
    OLDEST_PASSING,
    State,
    step,
)

# One fingerprint in two has no bit from there on.
_SAMPLED_SHIFT = np.uint64(63)
# Of so many ghosts one may be of those that pass, when there are too many.
PASSING_PART = 8


@step
def find(state: State, fingerprint: np.uint64) -> int:
    """The slot of a fingerprint, or -1."""
    mask = len(state.table) - 1
    place = int(fingerprint) & mask
    while True:
        slot = state.table[place]
        if slot < 0 or state.records[slot].fingerprint == fingerprint:
            return slot
        place = (place + 1) & mask


@step
def find_or_add(state: State, fingerprint: np.uint64) -> int:
    """The slot of a fingerprint: a new record is a ghost that was never used."""
    slot = find(state, fingerprint)
    if slot >= 0:
        return slot
    slot = _free_slot(state)
    record = state.records[slot]
    record.fingerprint = fingerprint
    record.last_use_s = -1.0
    record.saved_ms = 1.0
    record.size_bytes = 1
    record.children = 0
    record.kind = 0
    record.pins = 0
    record.tenant = 0
    record.uses = 0
    record.turn = 0
    record.bin = 0
    record.flags = 0
    _name(state, slot)
    become_ghost(state, slot)
    return slot


@step
def _place(state: State, slot: int) -> tuple[int, int, int]:
    """Where in `State.numbers` are how many ghosts of this one's kind there are, the oldest and
    the newest."""
    if state.records[slot].fingerprint >> _SAMPLED_SHIFT:
        return NUM_PASSING, OLDEST_PASSING, NEWEST_PASSING
    return NUM_GHOSTS, OLDEST_GHOST, NEWEST_GHOST


@step
def become_ghost(state: State, slot: int) -> None:
    """Append a record that is not held to the ghosts."""
    record = state.records[slot]
    number, oldest, newest = _place(state, slot)
    before = state.numbers[newest]
    record.parent = before
    record.leaf = -1
    if before >= 0:
        state.records[before].leaf = slot
    else:
        state.numbers[oldest] = slot
    state.numbers[newest] = slot
    state.numbers[number] += 1


@step
def stop_being_ghost(state: State, slot: int) -> None:
    """Take a record out of the ghosts; it is about to be held, or forgotten."""
    record = state.records[slot]
    number, oldest, newest = _place(state, slot)
    before, after = record.parent, record.leaf
    if before >= 0:
        state.records[before].leaf = after
    else:
        state.numbers[oldest] = after
    if after >= 0:
        state.records[after].parent = before
    else:
        state.numbers[newest] = before
    record.parent = -1
    record.leaf = -1
    state.numbers[number] -= 1


@step
def forget_ghosts(state: State, num_wanted: int) -> None:
    """Drop the oldest ghosts until there are slots for `num_wanted` more records."""
    staying, passing = state.numbers[NUM_GHOSTS], state.numbers[NUM_PASSING]
    most = state.numbers[MAX_GHOSTS]
    too_many = staying + passing + num_wanted - most
    if too_many > 0:
        # Half of the new ones will pass, too.
        allowed = max(0, most // PASSING_PART - num_wanted // 2)
        of_passing = min(too_many, max(0, passing - allowed))
        _forget_oldest(state, OLDEST_PASSING, passing, of_passing)
        _forget_oldest(state, OLDEST_GHOST, staying, too_many - of_passing)


@step
def _forget_oldest(state: State, oldest: int, number: int, num_unwanted: int) -> None:
    """Of `number` ghosts. One with a held child (which came without its parent) goes round once
    more."""
    for _ in range(number):
        if num_unwanted <= 0:
            return
        ghost = state.numbers[oldest]
        if state.records[ghost].children:
            stop_being_ghost(state, ghost)
            become_ghost(state, ghost)
        else:
            forget(state, ghost)
            num_unwanted -= 1


@step
def forget(state: State, ghost: int) -> None:
    """Drop a ghost's record."""
    record = state.records[ghost]
    stop_being_ghost(state, ghost)
    if record.flags & COUNTED:
        leave_bin(state, ghost)
    _unname(state, ghost)
    record.flags = 0
    record.older = state.numbers[FREE_SLOT]
    state.numbers[FREE_SLOT] = ghost


@step
def is_held(state: State, slot: int) -> bool:
    """Whether the record's block is in the cache."""
    return state.records[slot].flags & HELD != 0


@step
def _free_slot(state: State) -> int:
    slot = state.numbers[FREE_SLOT]
    if slot >= 0:
        state.numbers[FREE_SLOT] = state.records[slot].older
        return slot
    slot = state.numbers[NUM_SLOTS_USED]
    state.numbers[NUM_SLOTS_USED] += 1
    return slot


@step
def _name(state: State, slot: int) -> None:
    mask = len(state.table) - 1
    place = int(state.records[slot].fingerprint) & mask
    while state.table[place] >= 0:
        place = (place + 1) & mask
    state.table[place] = slot


@step
def _unname(state: State, slot: int) -> None:
    """Remove a name and close the gap, so that a probe never meets a tombstone."""
    mask = len(state.table) - 1
    gap = int(state.records[slot].fingerprint) & mask
    while state.table[gap] != slot:
        gap = (gap + 1) & mask
    place = gap
    while True:
        place = (place + 1) & mask
        other = state.table[place]
        if other < 0:
            break
        home = int(state.records[other].fingerprint) & mask
        if ((place - home) & mask) >= ((place - gap) & mask):
            state.table[gap] = other
            gap = place
    state.table[gap] = -1
