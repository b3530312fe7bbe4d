"""Which records are held, whose children they are, and which are leaves.

Only leaves can be evicted: held, no held child, not pinned. That is how a parent never leaves
before its children. A tenant's leaves are also a list of their own, for quotas.
"""

from __future__ import annotations

from mcp_vllm.store.smart_cache.layout import (
    HELD,
    HELD_BYTES,
    NUM_HELD,
    NUM_LEAVES,
    State,
    step,
)
from mcp_vllm.store.smart_cache.records import become_ghost, stop_being_ghost

BYTES, QUOTA, FIRST, LAST = 0, 1, 2, 3  # rows of `State.tenants`


@step
def hold(state: State, slot: int, parent: int) -> None:
    """Make a ghost a held block, under its parent if that is held."""
    stop_being_ghost(state, slot)
    record = state.records[slot]
    record.flags |= HELD
    record.parent = -1
    record.leaf = -1
    state.numbers[NUM_HELD] += 1
    _account(state, slot, record.size_bytes)
    become_leaf_if_free(state, slot)
    set_parent(state, slot, parent)


@step
def release(state: State, slot: int) -> None:
    """Make a held block a ghost. Its held children, if any, are without a parent from now on."""
    record = state.records[slot]
    _stop_being_leaf(state, slot)
    parent = record.parent
    if parent >= 0:
        state.records[parent].children -= 1
        become_leaf_if_free(state, parent)
    record.flags &= ~HELD & 0xFF
    record.pins = 0
    state.numbers[NUM_HELD] -= 1
    _account(state, slot, -record.size_bytes)
    become_ghost(state, slot)


@step
def set_parent(state: State, slot: int, parent: int) -> None:
    """Note the held parent of a held block; no effect when it has one or the parent is not held.

    Chains from elsewhere may contradict each other: a block that would be above itself, and so
    never leave, gets no parent.
    """
    record = state.records[slot]
    if record.parent >= 0 or parent < 0 or not state.records[parent].flags & HELD:
        return
    above = parent if record.children or parent == slot else -1
    while above >= 0:
        if above == slot:
            return
        above = state.records[above].parent
    record.parent = parent
    state.records[parent].children += 1
    _stop_being_leaf(state, parent)


@step
def resize(state: State, slot: int, size_bytes: int) -> None:
    """A held block takes another number of bytes."""
    _account(state, slot, size_bytes - state.records[slot].size_bytes)
    state.records[slot].size_bytes = size_bytes


@step
def change_pins(state: State, slot: int, by: int) -> None:
    """Add or take pins of a held block; it is no leaf while it has one."""
    record = state.records[slot]
    record.pins = max(0, int(record.pins) + by)
    if record.pins:
        _stop_being_leaf(state, slot)
    else:
        become_leaf_if_free(state, slot)


@step
def become_leaf_if_free(state: State, slot: int) -> None:
    """Append a held block to the leaves if it may leave."""
    record = state.records[slot]
    if record.leaf >= 0 or record.children or record.pins or not record.flags & HELD:
        return
    record.leaf = state.numbers[NUM_LEAVES]
    state.leaves[record.leaf] = slot
    state.numbers[NUM_LEAVES] += 1
    last = state.tenants[LAST, record.tenant]
    record.tenant_before = last
    record.tenant_after = -1
    if last >= 0:
        state.records[last].tenant_after = slot
    else:
        state.tenants[FIRST, record.tenant] = slot
    state.tenants[LAST, record.tenant] = slot


@step
def _stop_being_leaf(state: State, slot: int) -> None:
    record = state.records[slot]
    if record.leaf < 0:
        return
    state.numbers[NUM_LEAVES] -= 1
    moved = state.leaves[state.numbers[NUM_LEAVES]]
    state.leaves[record.leaf] = moved
    state.records[moved].leaf = record.leaf
    record.leaf = -1
    if record.tenant_before >= 0:
        state.records[record.tenant_before].tenant_after = record.tenant_after
    else:
        state.tenants[FIRST, record.tenant] = record.tenant_after
    if record.tenant_after >= 0:
        state.records[record.tenant_after].tenant_before = record.tenant_before
    else:
        state.tenants[LAST, record.tenant] = record.tenant_before


@step
def _account(state: State, slot: int, size_bytes: int) -> None:
    state.numbers[HELD_BYTES] += size_bytes
    state.tenants[BYTES, state.records[slot].tenant] += size_bytes
