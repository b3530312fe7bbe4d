"""What a request tells: which blocks it used, and what is known of them at that use."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mcp_vllm.store.smart_cache.ages import advance, enter_bin, leave_bin, note_reuse
from mcp_vllm.store.smart_cache.hazard import mean_chain, refresh
from mcp_vllm.store.smart_cache.kinds import OUTPUT_NOT_KNOWN, level_of_uses, octave, pack
from mcp_vllm.store.smart_cache.layout import (
    COUNTED,
    HELD,
    MAX_HELD,
    NEXT_REFRESH,
    NOW,
    NUM_ACCESSES,
    NUM_NEW,
    NUM_REQUESTS,
    NUM_TAILS,
    NUM_TURNS,
    State,
    step,
)
from mcp_vllm.store.smart_cache.records import find, find_or_add, make_slots
from mcp_vllm.store.smart_cache.tree import set_parent

MOST = 65535
# Counts lose half their weight in so many accesses: a few turnovers of the cache.
HALF_LIFE_TURNOVERS = 4
MIN_HALF_LIFE = 1 << 14
MIN_REFRESH, MAX_REFRESH = 512, 8192
SHORTEST_S = 1e-6


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
        ended: what ended the turn, a level.
        since_s: blocks used at or after that time were used by this request: not counted again.
        slots: receives the records' slots.

    Returns:
        how many leading blocks were held.
    """
    # No two requests at one time: their order is the order of use.
    now_s = max(now_s, state.seconds[NOW] + SHORTEST_S)
    advance(state, now_s)
    length = make_slots(state, fingerprints)
    fingerprints = fingerprints[:length]
    num_known, num_held = _known_and_held(state, fingerprints, since_s)
    for depth in range(length):
        slots[depth] = find_or_add(state, fingerprints[depth])
    turn = _turn(state, slots, num_known, since_s)
    new = octave(length - num_known, max(1.0, mean_chain(state) / 16), NUM_NEW - 1)
    output = OUTPUT_NOT_KNOWN
    if num_output_tokens >= 0:
        output = octave(num_output_tokens, 8.0, OUTPUT_NOT_KNOWN - 1)
    deeper = 0  # uses, before this request, of a deeper block: one that was forgotten had as many
    for depth in range(length - 1, -1, -1):
        slot = slots[depth]
        record = state.records[slot]
        if record.uses == 0 or record.last_use_s < since_s:
            if record.uses == 0:
                record.uses = deeper
            deeper = max(deeper, int(record.uses))
            if record.flags & COUNTED:
                note_reuse(state, slot)
            record.uses = min(int(record.uses) + 1, MOST)
        else:
            deeper = max(deeper, int(record.uses) - 1)
        if record.flags & COUNTED:
            leave_bin(state, slot)
        tail = octave(length - 1 - depth, 1.0, NUM_TAILS - 1)
        uses = level_of_uses(int(record.uses) - 1)
        record.kind = pack(uses, new, min(turn - 1, NUM_TURNS - 1), output, ended, tail)
        record.last_use_s = now_s
        record.turn = min(turn, 255)
        enter_bin(state, slot, 0)
        if depth and record.flags & HELD:
            set_parent(state, slot, slots[depth - 1])
    _count_accesses(state, length)
    return num_held


@step
def _known_and_held(
    state: State, fingerprints: NDArray[np.uint64], since_s: float
) -> tuple[int, int]:
    """How many leading blocks were used before this request, and how many are held.

    Those before a block that is known are, too, though they be forgotten.
    """
    num_known = num_held = 0
    for depth in range(len(fingerprints)):
        slot = find(state, fingerprints[depth])
        if slot < 0:
            continue
        record = state.records[slot]
        if record.uses > 1 or (record.uses == 1 and record.last_use_s < since_s):
            num_known = depth + 1
        if num_held == depth and record.flags & HELD:
            num_held = depth + 1
    return num_known, num_held


@step
def _turn(state: State, slots: NDArray[np.int32], num_known: int, since_s: float) -> int:
    """A session goes on where its deepest known block is; one block alone is a shared prompt."""
    if num_known < 2:
        return 1
    tip = state.records[slots[num_known - 1]]
    return int(tip.turn) if tip.last_use_s >= since_s else int(tip.turn) + 1


@step
def _count_accesses(state: State, number: int) -> None:
    state.numbers[NUM_ACCESSES] += number
    state.numbers[NUM_REQUESTS] += 1
    if state.numbers[NUM_ACCESSES] < state.numbers[NEXT_REFRESH]:
        return
    interval = min(max(state.numbers[NUM_ACCESSES] // 32, MIN_REFRESH), MAX_REFRESH)
    state.numbers[NEXT_REFRESH] = state.numbers[NUM_ACCESSES] + interval
    half_life = max(HALF_LIFE_TURNOVERS * state.numbers[MAX_HELD], MIN_HALF_LIFE)
    refresh(state, 0.5 ** (interval / half_life))
