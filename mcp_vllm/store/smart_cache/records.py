"""Slots, their names, and the ghosts: which record stands for which block.

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
    NUM_GHOSTS,
    NUM_SLOTS_USED,
    OLDEST_GHOST,
    State,
    step,
)


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
def become_ghost(state: State, slot: int) -> None:
    """Append a record that is not held to the ghosts."""
    record = state.records[slot]
    newest = state.numbers[NEWEST_GHOST]
    record.parent = newest
    record.leaf = -1
    if newest >= 0:
        state.records[newest].leaf = slot
    else:
        state.numbers[OLDEST_GHOST] = slot
    state.numbers[NEWEST_GHOST] = slot
    state.numbers[NUM_GHOSTS] += 1


@step
def stop_being_ghost(state: State, slot: int) -> None:
    """Take a record out of the ghosts; it is about to be held, or forgotten."""
    record = state.records[slot]
    before, after = record.parent, record.leaf
    if before >= 0:
        state.records[before].leaf = after
    else:
        state.numbers[OLDEST_GHOST] = after
    if after >= 0:
        state.records[after].parent = before
    else:
        state.numbers[NEWEST_GHOST] = before
    record.parent = -1
    record.leaf = -1
    state.numbers[NUM_GHOSTS] -= 1


@step
def forget_ghosts(state: State, num_wanted: int) -> None:
    """Drop the oldest ghosts until there are slots for `num_wanted` more records.

    A ghost with a held child (which came without its parent) goes round once more.
    """
    for _ in range(state.numbers[NUM_GHOSTS]):
        if state.numbers[NUM_GHOSTS] + num_wanted <= state.numbers[MAX_GHOSTS]:
            return
        ghost = state.numbers[OLDEST_GHOST]
        if state.records[ghost].children:
            stop_being_ghost(state, ghost)
            become_ghost(state, ghost)
        else:
            forget(state, ghost)


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
