"""Bringing blocks in: all of a chain, then whoever scores least leaves, newcomers included."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mcp_vllm.store.smart_cache.eviction import make_room, make_tenant_room
from mcp_vllm.store.smart_cache.layout import BUDGET_BYTES, HELD, State, step
from mcp_vllm.store.smart_cache.records import find, find_or_add, make_slots
from mcp_vllm.store.smart_cache.tree import QUOTA, hold


@step
def admit_chain(
    state: State,
    fingerprints: NDArray[np.uint64],
    sizes: NDArray[np.int32],
    saved_ms: NDArray[np.float32],
    parent: int,
    tenant: int,
    slots: NDArray[np.int32],
    fresh: NDArray[np.bool_],
    victims: NDArray[np.int32],
) -> int:
    """Offer blocks of a chain, each the child of the one before, the first that of `parent`.

    Blocks after one that can never fit are not looked at: without it they are useless. Nor are
    those for which there is no record left.

    Args:
        parent: a slot, or -1.
        slots: receives the slots of the blocks; -1 from the first that can never fit.
        fresh: receives whether each was not held before.
        victims: see `make_room`; newcomers that were not kept are among them.

    Returns:
        how many victims there are.
    """
    largest = min(state.numbers[BUDGET_BYTES], state.tenants[QUOTA, tenant])
    slots[:] = -1
    fresh[:] = False
    for i in range(make_slots(state, fingerprints)):
        if sizes[i] > largest:
            break
        slot = find_or_add(state, fingerprints[i])
        slots[i] = slot
        record = state.records[slot]
        if not record.flags & HELD:
            record.size_bytes = sizes[i]
            record.saved_ms = saved_ms[i]
            record.tenant = tenant
            hold(state, slot, parent)
            fresh[i] = True
        parent = slot
    num_victims = make_tenant_room(state, tenant, 0, victims)
    return num_victims + max(0, make_room(state, 0, 0, victims[:, num_victims:]))


@step
def hold_block(
    state: State, fingerprint: np.uint64, size_bytes: int, saved_ms: float, parent: int, tenant: int
) -> int:
    """Hold a block for which room was made; its slot."""
    make_slots(state, np.array([fingerprint]))
    slot = find_or_add(state, fingerprint)
    record = state.records[slot]
    if not record.flags & HELD:
        record.size_bytes = size_bytes
        record.saved_ms = saved_ms
        record.tenant = tenant
        hold(state, slot, parent)
    return slot


@step
def find_all(state: State, fingerprints: NDArray[np.uint64], slots: NDArray[np.int32]) -> None:
    """The slots of many names, -1 where there is none."""
    for i in range(len(fingerprints)):
        slots[i] = find(state, fingerprints[i])
