"""Age bins: every record that was used waits in the bin of its age.

Bins are lists in the order of last use, so only their heads need be looked at as time goes by: a
record costs one move a bin that it outlives, and what a bin's records went through is counted as
they leave it. That is the exposure that `hazard.py` divides by: unlike counting at the end, it
counts those that have not come back yet.
"""

from __future__ import annotations

from mcp_vllm.store.smart_cache.kinds import class_of, is_shared, uses_of
from mcp_vllm.store.smart_cache.layout import COUNTED, EDGES, NOW, NUM_BINS, NUM_TABLES, State, step

REUSED, PASSED, INSIDE = 0, 1, 2  # rows of `State.hazards` and `State.tables`


@step
def advance(state: State, now_s: float) -> None:
    """Let time pass: move records on to the bins of their age. A clock that runs back is held."""
    if now_s < state.seconds[NOW]:
        return
    state.seconds[NOW] = now_s
    for bin_ in range(NUM_BINS):  # upwards: a record may outlive several bins in one step
        slot = state.queues[0, bin_]
        while slot >= 0 and now_s - state.records[slot].last_use_s >= EDGES[bin_ + 1]:
            count(state, PASSED, slot, bin_, 1.0)
            leave_bin(state, slot)
            enter_bin(state, slot, bin_ + 1)
            slot = state.queues[0, bin_]


@step
def note_reuse(state: State, slot: int) -> None:
    """A record is used again: its kind had a reuse at this age, half-way through the bin."""
    bin_ = state.records[slot].bin
    if bin_ < NUM_BINS:
        count(state, REUSED, slot, bin_, 1.0)
        count(state, PASSED, slot, bin_, 0.5)


@step
def count(state: State, row: int, slot: int, bin_: int, by: float) -> None:
    """Add to a count of the record's kind in all tables."""
    kind = int(state.records[slot].kind)
    state.hazards[row, uses_of(kind), bin_] += by
    if is_shared(kind):
        return
    for table in range(NUM_TABLES):
        state.tables[row, table, class_of(kind, table), bin_] += by


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
    count(state, INSIDE, slot, bin_, 1.0)


@step
def leave_bin(state: State, slot: int) -> None:
    """Take a record out of its bin; its kind must be the one with which it came in."""
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
    count(state, INSIDE, slot, bin_, -1.0)
