"""Age bins: every record that was used waits in the bin of its age.

Bins are lists in the order of last use, so only their heads need be looked at as time goes by: a
record costs one move a bin that it outlives, and what a bin's records went through is counted as
they leave it. That is the exposure that `hazard.py` divides by: unlike counting at the end, it
counts those that have not come back yet.
"""

from __future__ import annotations

from mcp_vllm.store.smart_cache.hazard import factor_of, learn
from mcp_vllm.store.smart_cache.layout import COUNTED, EDGES, NOW, NUM_BINS, State, step

REUSED, PASSED, INSIDE = 0, 1, 2  # rows of `State.hazards`


@step
def advance(state: State, now_s: float) -> None:
    """Let time pass: move records on to the bins of their age. A clock that runs back is held."""
    if now_s < state.seconds[NOW]:
        return
    state.seconds[NOW] = now_s
    for bin_ in range(NUM_BINS - 1, -1, -1):
        slot = state.queues[0, bin_]
        while slot >= 0 and now_s - state.records[slot].last_use_s >= EDGES[bin_ + 1]:
            factor = factor_of(state, slot, bin_)
            use_class = state.records[slot].use_class
            state.hazards[PASSED, use_class, bin_] += factor
            learn(state, slot, bin_, 0.0, state.hazards[3, use_class, bin_] * factor)
            leave_bin(state, slot)
            enter_bin(state, slot, bin_ + 1)
            slot = state.queues[0, bin_]


@step
def note_reuse(state: State, slot: int) -> None:
    """A record is used again: its class had a reuse at this age."""
    record = state.records[slot]
    bin_ = record.bin
    if bin_ < NUM_BINS:
        factor = factor_of(state, slot, bin_)
        state.hazards[REUSED, record.use_class, bin_] += 1.0
        state.hazards[PASSED, record.use_class, bin_] += 0.5 * factor
        expected = 0.5 * state.hazards[3, record.use_class, bin_] * factor
        learn(state, slot, bin_, 1.0, expected)


@step
def enter_bin(state: State, slot: int, bin_: int) -> None:
    """Append a record to a bin as its youngest."""
    record = state.records[slot]
    youngest = state.queues[1, bin_]
    record.older = youngest
    record.younger = -1
    record.bin = bin_
    record.flags |= COUNTED
    if youngest >= 0:
        state.records[youngest].younger = slot
    else:
        state.queues[0, bin_] = slot
    state.queues[1, bin_] = slot
    state.hazards[INSIDE, record.use_class, bin_] += 1.0


@step
def leave_bin(state: State, slot: int) -> None:
    """Take a record out of its bin."""
    record = state.records[slot]
    bin_ = record.bin
    if record.older >= 0:
        state.records[record.older].younger = record.younger
    else:
        state.queues[0, bin_] = record.younger
    if record.younger >= 0:
        state.records[record.younger].older = record.older
    else:
        state.queues[1, bin_] = record.older
    record.flags &= ~COUNTED & 0xFF
    state.hazards[INSIDE, record.use_class, bin_] -= 1.0
