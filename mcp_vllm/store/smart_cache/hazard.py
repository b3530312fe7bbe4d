"""When blocks come back, learned from those that do and those that do not.

A *hazard* is the chance that a block which is that old is used before it leaves its age bin. It is
counted a class of blocks (by how often they were used) and a bin, and multiplied by a factor a
feature level, one for young blocks and one for old: a proportional hazards model (Cox 1972), fitted
by steps of the gradient over what each level was learned from. All of it fades, so that a change of
the load is followed.

The score is an *index* in the sense of Gittins (1979): keeping a block costs room for a time and may
bring one reuse; the index is the best ratio of expected reuses to expected seconds over all times at
which one could stop waiting. A session that is about to answer is worth more than one that has just
spoken, and both more than one that should have spoken long ago.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mcp_vllm.store.smart_cache.layout import (
    EDGES,
    FACTORS_PER_OCTAVE,
    NUM_BINS,
    NUM_FACTORS,
    NUM_FEATURES,
    NUM_LEVELS,
    NUM_PHASES,
    NUM_USE_CLASSES,
    PHASE_EDGE,
    State,
    step,
)

FIRST_HAZARD = 0.1  # of an age bin that nothing is known of; each older bin has less
OLDER_BIN_HAZARD = 0.7
PRIOR_BLOCKS = 20.0  # how many blocks the pooled estimate counts for beside a class's own
LEARNING_RATE = 0.5
MAX_LOG_FACTOR = 3.0
ESTIMATE = 3  # row of `State.hazards`


@step
def factor_of(state: State, slot: int, bin_: int) -> float:
    """How much likelier than its class this block is to come back at that age."""
    phase = 0 if EDGES[bin_] < state.seconds[PHASE_EDGE] else 1
    total = 0.0
    for feature in range(NUM_FEATURES):
        total += state.weights[0, feature, state.features[slot, feature], phase]
    return math.exp(total)


@step
def learn(state: State, slot: int, bin_: int, seen: float, expected: float) -> None:
    """Note that `seen` reuses came where `expected` were."""
    phase = 0 if EDGES[bin_] < state.seconds[PHASE_EDGE] else 1
    for feature in range(NUM_FEATURES):
        level = state.features[slot, feature]
        state.weights[1, feature, level, phase] += seen - expected
        state.weights[2, feature, level, phase] += expected


@step
def curve_of(state: State, slot: int) -> int:
    """Which row of the index is this block's, with the weights of now."""
    curve = int(state.records[slot].use_class)
    for phase in range(NUM_PHASES):
        total = 0.0
        for feature in range(NUM_FEATURES):
            total += state.weights[0, feature, state.features[slot, feature], phase]
        octaves = total / math.log(2.0) * FACTORS_PER_OCTAVE
        level = int(math.floor(octaves + 0.5)) + NUM_FACTORS // 2
        curve = curve * NUM_FACTORS + min(max(level, 0), NUM_FACTORS - 1)
    return curve


@step
def refresh(state: State, fade: float) -> None:
    """Take in what was learned since the last refresh: weights, hazards, the index.

    Args:
        fade: what remains of older counts, up to 1.
    """
    _step_weights(state, fade)
    _estimate_hazards(state, fade)
    _set_phase_edge(state)
    chances = np.empty((NUM_FACTORS, NUM_BINS))
    groups = np.empty((NUM_BINS, 3))
    for use_class in range(NUM_USE_CLASSES):
        for level in range(NUM_FACTORS):
            factor = 2.0 ** ((level - NUM_FACTORS // 2) / FACTORS_PER_OCTAVE)
            for bin_ in range(NUM_BINS):
                hazard = state.hazards[ESTIMATE, use_class, bin_]
                chances[level, bin_] = 1.0 - math.exp(-hazard * factor)
        for young in range(NUM_FACTORS):
            for old in range(NUM_FACTORS):
                curve = (use_class * NUM_FACTORS + young) * NUM_FACTORS + old
                _fill_index(state, curve, chances[young], chances[old], groups)


@step
def _step_weights(state: State, fade: float) -> None:
    for feature in range(NUM_FEATURES):
        for level in range(NUM_LEVELS):
            for phase in range(NUM_PHASES):
                slope = state.weights[1, feature, level, phase]
                weight = state.weights[0, feature, level, phase]
                weight += LEARNING_RATE * slope / (
                    state.weights[2, feature, level, phase] + PRIOR_BLOCKS
                )
                state.weights[0, feature, level, phase] = min(
                    max(weight, -MAX_LOG_FACTOR), MAX_LOG_FACTOR
                )
                state.weights[1, feature, level, phase] = 0.0
                state.weights[2, feature, level, phase] *= fade


@step
def _estimate_hazards(state: State, fade: float) -> None:
    """Hazards a class, drawn to that of all classes, which is drawn to that of the bin before.

    A record still inside a bin has been through half of it.
    """
    before = FIRST_HAZARD
    for bin_ in range(NUM_BINS):
        reused = exposed = 0.0
        for use_class in range(NUM_USE_CLASSES):
            state.hazards[0, use_class, bin_] *= fade
            state.hazards[1, use_class, bin_] *= fade
            reused += state.hazards[0, use_class, bin_]
            exposed += state.hazards[1, use_class, bin_] + 0.5 * state.hazards[2, use_class, bin_]
        pooled = (reused + PRIOR_BLOCKS * before) / (exposed + PRIOR_BLOCKS)
        before = pooled * OLDER_BIN_HAZARD
        for use_class in range(NUM_USE_CLASSES):
            own = state.hazards[1, use_class, bin_] + 0.5 * state.hazards[2, use_class, bin_]
            state.hazards[ESTIMATE, use_class, bin_] = (
                state.hazards[0, use_class, bin_] + PRIOR_BLOCKS * pooled
            ) / (own + PRIOR_BLOCKS)


@step
def _set_phase_edge(state: State) -> None:
    """Young is what is younger than half of all reuses."""
    total = 0.0
    for bin_ in range(NUM_BINS):
        for use_class in range(NUM_USE_CLASSES):
            total += state.hazards[0, use_class, bin_]
    if total < PRIOR_BLOCKS:
        return
    reached = 0.0
    for bin_ in range(NUM_BINS):
        for use_class in range(NUM_USE_CLASSES):
            reached += state.hazards[0, use_class, bin_]
        if reached >= 0.5 * total:
            state.seconds[PHASE_EDGE] = EDGES[bin_]
            return


@step
def _fill_index(
    state: State,
    curve: int,
    young: NDArray[np.float64],
    old: NDArray[np.float64],
    groups: NDArray[np.float64],
) -> None:
    """One row of the index, from the chance of a reuse in each bin.

    From the oldest bin to the youngest, bins are merged into groups (reuses, seconds, share that
    stays) as long as waiting for the next group pays more than stopping before it.
    """
    num_groups = 0
    for bin_ in range(NUM_BINS - 1, -1, -1):
        chance = young[bin_] if EDGES[bin_] < state.seconds[PHASE_EDGE] else old[bin_]
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
        state.index[curve, bin_] = reuses / seconds
    state.index[curve, NUM_BINS] = 0.0
