"""Slots, their names, and the ghosts: which record stands for which block.

One ghost in two, by the highest bit of its fingerprint, *stays*; the others *pass*: where ghosts
are too many and more than an eighth of them pass, the oldest of these go first. Who comes back late
is counted by those that stay, a fair sample, and what the other blocks of a chain were follows from
them (`use.py`).

Steps of `SmartCache`; each takes its `State` and changes it in place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mcp_vllm.store.smart_cache.ages import leave_bin
from mcp_vllm.store.smart_cache.layout import (
    COUNTED,
    FREE_SLOT,
    HELD,
    MAX_GHOSTS,
    NEWEST_PASSING,
    NEWEST_STAYING,
    NUM_HELD,
    NUM_PASSING,
    NUM_SLOTS_USED,
    NUM_STAYING,
    OLDEST_PASSING,
    OLDEST_STAYING,
    PROTECTED,
    State,
    step,
)

# The highest bit of a fingerprint is 1 where its ghost passes.
_PASSING_SHIFT = np.uint64(63)
# What part of all ghosts may be such, when there are too many: an eighth.
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
def num_ghosts(state: State) -> int:
    """Of both kinds."""
    return state.numbers[NUM_STAYING] + state.numbers[NUM_PASSING]


@step
def _place(state: State, slot: int) -> tuple[int, int, int]:
    """Where in `State.numbers` are how many ghosts of this one's kind there are, the oldest and
    the newest."""
    if state.records[slot].fingerprint >> _PASSING_SHIFT:
        return NUM_PASSING, OLDEST_PASSING, NEWEST_PASSING
    return NUM_STAYING, OLDEST_STAYING, NEWEST_STAYING


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
def make_slots(state: State, fingerprints: NDArray[np.uint64]) -> int:
    """Forget ghosts, none of these, until all of these names can have records; how many of the
    first can, if some cannot.
    """
    num_new = 0
    for fingerprint in fingerprints:
        slot = find(state, fingerprint)
        if slot < 0:
            num_new += 1
        elif not is_held(state, slot):
            stop_being_ghost(state, slot)
            become_ghost(state, slot)  # the newest of its kind
            state.records[slot].flags |= PROTECTED
    _forget_ghosts(state, num_new)
    for fingerprint in fingerprints:
        slot = find(state, fingerprint)
        if slot >= 0 and not is_held(state, slot):
            state.records[slot].flags &= ~PROTECTED & 0xFF
    return _num_fitting(state, fingerprints, num_new)


@step
def _num_fitting(state: State, fingerprints: NDArray[np.uint64], num_new: int) -> int:
    """How many of the first names have a record or a slot to have one."""
    free = len(state.records) - state.numbers[NUM_HELD] - num_ghosts(state)
    if num_new <= free:
        return len(fingerprints)
    for place in range(len(fingerprints)):
        if find(state, fingerprints[place]) < 0:
            if free == 0:
                return place
            free -= 1
    return len(fingerprints)


@step
def _forget_ghosts(state: State, num_wanted: int) -> None:
    """Drop the oldest ghosts until there are slots for `num_wanted` more records."""
    most = state.numbers[MAX_GHOSTS]
    too_many = num_ghosts(state) + num_wanted - most
    # Half of the new ones will pass, too.
    allowed = max(0, most // PASSING_PART - num_wanted // 2)
    of_passing = min(too_many, state.numbers[NUM_PASSING] - allowed)
    too_many -= _forget_oldest(state, OLDEST_PASSING, NUM_PASSING, of_passing)
    too_many -= _forget_oldest(state, OLDEST_STAYING, NUM_STAYING, too_many)
    _forget_oldest(state, OLDEST_PASSING, NUM_PASSING, too_many)


@step
def _forget_oldest(state: State, oldest: int, number: int, num_unwanted: int) -> int:
    """How many went. A protected one, or one with a held child (whose parent the owner has
    dropped), goes round once more."""
    num_forgotten = 0
    for _ in range(state.numbers[number]):
        if num_forgotten >= num_unwanted:
            break
        ghost = state.numbers[oldest]
        if state.records[ghost].children or state.records[ghost].flags & PROTECTED:
            stop_being_ghost(state, ghost)
            become_ghost(state, ghost)
        else:
            forget(state, ghost)
            num_forgotten += 1
    return num_forgotten


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
    if slot == len(state.records):
        raise IndexError("more blocks than SmartCache has records for")
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
