"""What a request tells: which blocks it used, and the levels of their features."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mcp_vllm.store.smart_cache.ages import advance, enter_bin, leave_bin, note_reuse
from mcp_vllm.store.smart_cache.hazard import curve_of, refresh
from mcp_vllm.store.smart_cache.layout import (
    COUNTED,
    HELD,
    NEXT_REFRESH,
    NUM_ACCESSES,
    NUM_FEATURES,
    NUM_LEVELS,
    State,
    step,
)
from mcp_vllm.store.smart_cache.records import find, find_or_add, forget_ghosts
from mcp_vllm.store.smart_cache.tree import set_parent

# Places of `layout.FEATURES`.
GAP, NEW, TURN, TAIL, OUTPUT, DEPTH, PAUSE, BRANCH, SHARED, ENDED = range(NUM_FEATURES)

MOST = 65535
FADE = 0.98
UNKNOWN = NUM_LEVELS - 1


@step
def use_chain(
    state: State,
    fingerprints: NDArray[np.uint64],
    now_s: float,
    num_output_tokens: int,
    ended: int,
    since_s: float,
    slots: NDArray[np.int32],
) -> int:
    """A request used this chain, root first.

    Args:
        num_output_tokens: of the answer, -1 if not known.
        ended: level of the feature "ended".
        since_s: blocks used at or after that time were used by this request: not counted again.
        slots: receives the records' slots.

    Returns:
        how many leading blocks were held.
    """
    advance(state, now_s)
    length = len(fingerprints)
    forget_ghosts(state, length)
    num_known = num_held = 0
    for depth in range(length):
        slot = find(state, fingerprints[depth])
        if slot < 0 or state.records[slot].uses == 0:
            break
        if depth and state.records[slot].uses == 1 and state.records[slot].last_use_s >= since_s:
            break  # new when the request began
        num_known += 1
        if num_held == depth and state.records[slot].flags & HELD:
            num_held += 1
    for depth in range(length):
        slots[depth] = find_or_add(state, fingerprints[depth])
    request = np.zeros(NUM_FEATURES, np.uint8)
    turn = _describe(state, slots, length, num_known, now_s, since_s, request)
    request[OUTPUT] = _octave(num_output_tokens, 4.0) if num_output_tokens >= 0 else UNKNOWN
    request[ENDED] = ended
    for depth in range(length - 1, -1, -1):
        slot = slots[depth]
        record = state.records[slot]
        gap = state.features[slot, GAP]
        if record.uses == 0 or record.last_use_s < since_s:
            gap = _octave(now_s - record.last_use_s, 0.5) if record.uses else UNKNOWN
            if record.flags & COUNTED:
                note_reuse(state, slot)
            record.uses = min(int(record.uses) + 1, MOST)
        if record.flags & COUNTED:
            leave_bin(state, slot)
        state.features[slot, :] = request
        state.features[slot, GAP] = gap
        state.features[slot, TAIL] = min(_octave(length - 1 - depth, 1.0), 6)
        state.features[slot, DEPTH] = _octave(depth, 1.0)
        state.features[slot, SHARED] = 1 + min(2, num_known - 1 - depth) if depth < num_known else 0
        record.last_use_s = now_s
        record.use_class = _use_class(record.uses - 1)
        record.turn = turn
        record.chain = min(length, MOST)
        record.curve = curve_of(state, slot)
        enter_bin(state, slot, 0)
        if depth and record.flags & HELD:
            set_parent(state, slot, slots[depth - 1])
    state.numbers[NUM_ACCESSES] += length
    if state.numbers[NUM_ACCESSES] >= state.numbers[NEXT_REFRESH]:
        interval = min(max(state.numbers[NUM_ACCESSES] // 8, 256), 4096)
        state.numbers[NEXT_REFRESH] = state.numbers[NUM_ACCESSES] + interval
        refresh(state, FADE)
    return num_held


@step
def _describe(
    state: State,
    slots: NDArray[np.int32],
    length: int,
    num_known: int,
    now_s: float,
    since_s: float,
    request: NDArray[np.uint8],
) -> int:
    """The features that all blocks of a request share; its turn.

    A request goes on where the deepest block that was known before was used last.
    """
    request[NEW] = _octave(length - num_known, 1.0)
    request[PAUSE] = UNKNOWN
    request[BRANCH] = UNKNOWN
    turn = 1
    if num_known:
        tip = state.records[slots[num_known - 1]]
        if tip.last_use_s >= since_s:
            request[PAUSE] = state.features[slots[num_known - 1], PAUSE]
            request[BRANCH] = state.features[slots[num_known - 1], BRANCH]
            turn = tip.turn
        elif num_known > 1:
            request[PAUSE] = _octave(now_s - tip.last_use_s, 0.5)
            request[BRANCH] = min(_octave(max(0, int(tip.chain) - num_known), 1.0), 8)
            turn = min(int(tip.turn) + 1, 255)
    request[TURN] = min(turn, 8)
    return turn


@step
def _octave(value: float, lowest: float) -> int:
    """The level of a value: 0 below `lowest`, then one an octave."""
    if value < lowest:
        return 0
    return min(int(math.log2(value / lowest)) + 1, NUM_LEVELS - 2)


@step
def _use_class(uses: int) -> int:
    if uses < 4:
        return uses
    if uses < 6:
        return 4
    if uses < 10:
        return 5
    return 6 if uses < 30 else 7
