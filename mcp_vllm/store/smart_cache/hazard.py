"""When blocks come back, learned from those that do and those that do not.

A *hazard* is how often blocks of an age are used before they leave their age bin. It is counted
for all blocks, for blocks of equal uses, and for the classes of a few tables, each of which looks
at other features; of blocks that many requests share the tables know nothing. A class starts from
the hazard of its uses and leaves it as its own count grows; what the tables say is multiplied,
damped because they partly say the same. Counts fade, so that a change of the load is followed.

The score is an *index* in the sense of Gittins (1979): keeping a block takes room for a time and
may bring one reuse; the index is the best ratio of expected reuses to expected seconds over all
times at which one could stop waiting. A session that is about to answer is worth more than one that
has just spoken, and both more than one that should have spoken long ago.
"""

from __future__ import annotations

import math

import numpy as np

from mcp_vllm.store.smart_cache.kinds import class_of, is_shared, uses_of
from mcp_vllm.store.smart_cache.layout import (
    CLASSES_PER_USE,
    EDGES,
    NUM_ACCESSES,
    NUM_BINS,
    NUM_CLASSES,
    NUM_REFRESHES,
    NUM_REQUESTS,
    NUM_TABLES,
    NUM_USES,
    State,
    step,
)

FIRST_HAZARD = 0.1  # of an age bin that nothing is known of; each older bin has less
OLDER_BIN_HAZARD = 0.7
# What the coarser estimate counts for beside a class's own counts, in requests: the blocks of one
# come back together, however small they are.
PRIOR_EXPOSED = 0.8
PRIOR_REUSED = 2.0
DAMPING = 0.8
# How much likelier than all blocks those of each level of uses are to come back, before anything is
# counted: in proportion to the uses, as where popularity is all there is.
USES_FACTOR = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 7.0, *(12.0 * 2.0 ** np.arange(NUM_USES - 6))])
ESTIMATE = 3  # row of `State.hazards` and `State.tables`


@step
def refresh(state: State, fade: float) -> None:
    """Take in what was counted since the last refresh.

    Args:
        fade: what remains of older counts, up to 1.
    """
    state.hazards[:2] *= fade
    _estimate_hazards(state)
    for table in range(NUM_TABLES):
        for class_ in range(NUM_CLASSES):
            _estimate_ratios(state, table, class_, fade)
    state.numbers[NUM_REFRESHES] += 1


@step
def index_of(state: State, kind: int, bin_: int) -> float:
    """Reuses a second to expect of a block of this kind and age."""
    if state.versions[kind] != state.numbers[NUM_REFRESHES]:
        _fill_index(state, kind)
        state.versions[kind] = state.numbers[NUM_REFRESHES]
    return float(state.rates[kind, bin_])


@step
def mean_chain(state: State) -> float:
    """Blocks of a request on average."""
    return max(1.0, state.numbers[NUM_ACCESSES] / max(1, state.numbers[NUM_REQUESTS]))


@step
def _estimate_hazards(state: State) -> None:
    """Hazards by uses, drawn to that of all blocks times `USES_FACTOR`; that to the bin before.

    A record still inside a bin has been through half of it.
    """
    before = FIRST_HAZARD
    prior = PRIOR_EXPOSED * mean_chain(state)
    for bin_ in range(NUM_BINS):
        reused = exposed = 0.0
        for uses in range(NUM_USES):
            reused += state.hazards[0, uses, bin_]
            exposed += state.hazards[1, uses, bin_] + 0.5 * state.hazards[2, uses, bin_]
        pooled = (reused + prior * before) / (exposed + prior)
        before = pooled * OLDER_BIN_HAZARD
        for uses in range(NUM_USES):
            own = state.hazards[1, uses, bin_] + 0.5 * state.hazards[2, uses, bin_]
            state.hazards[ESTIMATE, uses, bin_] = (
                state.hazards[0, uses, bin_] + prior * pooled * USES_FACTOR[uses]
            ) / (own + prior)


@step
def _estimate_ratios(state: State, table: int, class_: int, fade: float) -> None:
    """How much likelier a class comes back than others of its uses: over all ages, then at each."""
    counts = state.tables[:, table, class_]
    if not counts[:ESTIMATE].any():  # never met: not written to, so it takes no memory
        return
    base = state.hazards[ESTIMATE, class_ // CLASSES_PER_USE]
    reused = expected = 0.0
    for bin_ in range(NUM_BINS):
        counts[0, bin_] *= fade
        counts[1, bin_] *= fade
        reused += counts[0, bin_]
        expected += (counts[1, bin_] + 0.5 * counts[2, bin_]) * base[bin_]
    if expected == 0.0:
        return
    prior = PRIOR_REUSED * mean_chain(state)
    pooled = (reused + prior) / (expected + prior)
    log_pooled = math.log(pooled)
    for bin_ in range(NUM_BINS):
        exposed = counts[1, bin_] + 0.5 * counts[2, bin_]
        counts[ESTIMATE, bin_] = log_pooled
        if exposed:
            own = (counts[0, bin_] + prior) / (exposed * base[bin_] * pooled + prior)
            counts[ESTIMATE, bin_] += math.log(own)


@step
def _fill_index(state: State, kind: int) -> None:
    """One row of the index.

    From the oldest bin to the youngest, bins are merged into groups (reuses, seconds, share that
    stays) as long as waiting for the next group pays more than stopping before it.
    """
    groups = np.empty((NUM_BINS, 3))
    num_groups = 0
    ratios = np.zeros(NUM_BINS)
    for table in range(NUM_TABLES):
        if state.active[table] and not is_shared(kind):
            ratios += state.tables[ESTIMATE, table, class_of(kind, table), :NUM_BINS]
    base = state.hazards[ESTIMATE, uses_of(kind)]
    for bin_ in range(NUM_BINS - 1, -1, -1):
        hazard = base[bin_] * math.exp(DAMPING * ratios[bin_])
        chance = 1.0 - math.exp(-hazard)
        reuses, staying = chance, 1.0 - chance
        seconds = (1.0 - 0.5 * chance) * (EDGES[bin_ + 1] - EDGES[bin_])
        while num_groups:
            later = groups[num_groups - 1]
            if later[0] * seconds <= reuses * later[1]:
                break
            reuses += staying * later[0]
            seconds += staying * later[1]
            staying *= later[2]
            num_groups -= 1
        groups[num_groups, 0] = reuses
        groups[num_groups, 1] = seconds
        groups[num_groups, 2] = staying
        num_groups += 1
        state.rates[kind, bin_] = reuses / seconds
    state.rates[kind, NUM_BINS] = 0.0
