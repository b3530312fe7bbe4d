"""What any policy could reach on a trace of chats: hit rates when the future is foretold.

    pip install lightgbm
    python benchmarks/cache_bound.py --trace FILE [--capacity 0.03 0.1 ...]

Whole sessions are kept or dropped. Each request leaves a *tip*: the blocks that it used last. A
tip's score is the Gittins index (as in mcp_vllm/store/smart_cache/hazard.py) of a hazard by age,
and the lowest tip loses its blocks from the end. What differs from row to row is who gives the
hazard, from counts over the whole trace to a look at the next use. Every row sees what no online
policy can: the later requests too. The last, partly filled block of a prompt is not kept, nor what
the session's next turn left behind; blocks of many requests stay.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from mcp_vllm.cache_bench.trace import Trace, read

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Ages in bins, two an octave, from a second and a half.
EDGES = np.concatenate(([0.0], 1.5 * 2.0 ** (np.arange(1, 24) / 2)))
NUM_BINS = len(EDGES) - 1
SHARED_USES = 20  # a block of so many requests is a shared prompt, and stays
MOST_TURNS = 8
FOLDS, SEEDS = 5, 3
RETRAIN_S = 60.0


@dataclass(frozen=True)
class Sessions:
    """The trace as arrays. A request continues the one that last used its deepest known block, if
    that is not the first block.

    Attributes:
        starts [requests + 1]: where each request's blocks begin in `blocks`.
        blocks [accesses]: ids from 0.
        time_s, next_s [requests]: when it came, and when its session came back; inf: never.
        parent, root, turn, known [requests]: the request before it in its session or -1, the first
            one, its number from 1, and how many of its blocks had been used before.
        num_kept [requests]: its blocks without the last, if that is partly filled.
    """

    starts: Ints
    blocks: Ints
    num_blocks: int
    time_s: Floats
    next_s: Floats
    parent: Ints
    root: Ints
    turn: Ints
    known: Ints
    num_kept: Ints


@dataclass(frozen=True)
class Learned:
    """How trees are learned: their number and size, and the seed of their sampling."""

    leaves: int
    rounds: int
    seed: int


def sessions_of(trace: Trace) -> Sessions:
    requests = trace.requests
    number = len(requests)
    owner = np.full(trace.num_blocks, -1, np.int64)
    parent, known = np.full(number, -1, np.int64), np.zeros(number, np.int64)
    root, turn, next_s = np.arange(number), np.ones(number, np.int64), np.full(number, np.inf)
    for i, request in enumerate(requests):
        blocks = np.asarray(request.blocks, np.int64)
        fresh = np.flatnonzero(owner[blocks] < 0)
        known[i] = fresh[0] if fresh.size else blocks.size
        if known[i] >= 2:
            parent[i] = before = owner[blocks[known[i] - 1]]
            root[i], turn[i] = root[before], turn[before] + 1
            next_s[before] = min(next_s[before], request.time_s)
        owner[blocks] = i
    lengths = [len(request.blocks) for request in requests]
    partly = [bool(request.num_tokens % trace.block_tokens) for request in requests]
    return Sessions(
        starts=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        blocks=np.concatenate([np.asarray(each.blocks, np.int64) for each in requests]),
        num_blocks=trace.num_blocks,
        time_s=np.array([request.time_s for request in requests]),
        next_s=next_s,
        parent=parent,
        root=root,
        turn=turn,
        known=known,
        num_kept=np.array(lengths) - np.array(partly, np.int64),
    )


@numba.njit(cache=False)
def hits_of(capacity, scores, edges, time_s, starts, blocks, num_kept, parent, is_shared):
    """Hit blocks, where the tip with the lowest score [tip, age bin] loses its blocks first."""
    held = np.zeros(is_shared.size, np.bool_)
    owner = np.full(is_shared.size, -1, np.int64)
    counts, ends = np.zeros(time_s.size, np.int64), starts[1:] - 1
    is_left = np.zeros(time_s.size, np.bool_)
    live = np.empty(time_s.size, np.int64)
    num_live = num_held = hits = 0
    for i in range(time_s.size):
        position = starts[i]
        while position < starts[i + 1] and held[blocks[position]]:
            position += 1
        hits += position - starts[i]
        for place in range(starts[i], starts[i + 1]):
            block, is_kept = blocks[place], place < starts[i] + num_kept[i]
            if held[block] and owner[block] >= 0:
                counts[owner[block]] -= 1
            if held[block] and not is_kept and not is_shared[block]:
                held[block] = False
                num_held -= 1
            elif not held[block] and is_kept:
                held[block] = True
                num_held += 1
            owner[block] = -1 if is_shared[block] else i
            counts[i] += held[block] and owner[block] == i
        if parent[i] >= 0:
            is_left[parent[i]] = True
        live[num_live] = i
        num_live += 1
        while num_held > capacity:
            tip, lowest, at = -1, np.inf, 0
            while at < num_live:
                one = live[at]
                if counts[one] <= 0:
                    num_live -= 1
                    live[at] = live[num_live]
                    continue
                age = np.searchsorted(edges, time_s[i] - time_s[one], side="right") - 1
                score = -1e300 if is_left[one] else scores[one, min(age, scores.shape[1] - 1)]
                if tip < 0 or score < lowest or (score == lowest and one < tip):
                    tip, lowest = one, score
                at += 1
            if tip < 0:
                break
            while num_held > capacity and counts[tip] > 0:
                block = blocks[ends[tip]]
                ends[tip] -= 1
                if held[block] and owner[block] == tip:
                    held[block] = False
                    counts[tip] -= 1
                    num_held -= 1
    return hits


@numba.njit(cache=False)
def index_of(hazards, edges):
    """Gittins indices [tip, age bin] of hazards of that shape: the best ratio of expected reuses to
    expected seconds over all times at which one could give up."""
    scores = np.zeros(hazards.shape)
    groups = np.empty((hazards.shape[1], 3))
    for i in range(hazards.shape[0]):
        top = 0
        for b in range(hazards.shape[1] - 1, -1, -1):
            reuses, stays = hazards[i, b], 1 - hazards[i, b]
            seconds = (1 - 0.5 * reuses) * (edges[b + 1] - edges[b])
            while top and groups[top - 1, 0] * seconds > reuses * groups[top - 1, 1]:
                reuses += stays * groups[top - 1, 0]
                seconds += stays * groups[top - 1, 1]
                stays *= groups[top - 1, 2]
                top -= 1
            groups[top] = reuses, seconds, stays
            top += 1
            scores[i, b] = reuses / seconds
    return scores


def bins_of(seconds: Floats) -> Ints:
    return np.minimum(np.searchsorted(EDGES, seconds, side="right") - 1, NUM_BINS)


def counted(sessions: Sessions, group: NDArray[np.bool_]) -> Floats:
    """The hazard of these tips, counted over the whole trace [bins]."""
    wait_s = sessions.next_s - sessions.time_s
    reused, exposed = np.zeros(NUM_BINS), np.zeros(NUM_BINS)
    seen_s = np.minimum(wait_s, sessions.time_s[-1] - sessions.time_s)
    for i in np.flatnonzero(group):
        last = min(bins_of(seen_s[i]), NUM_BINS - 1)
        returns = bool(np.isfinite(wait_s[i]) and bins_of(wait_s[i]) < NUM_BINS)
        exposed[:last] += 1
        exposed[last] += 1.0 if returns else 0.5
        reused[last] += returns
    return reused / np.maximum(exposed, 1)


@dataclass(frozen=True)
class Observed:
    """What is known at a time: each tip and age bin that was lived through, whether the reuse came
    in it, and what it counts for; half, if the tip is still in that bin."""

    tips: Ints
    ages: Ints
    reused: NDArray[np.bool_]
    weights: Floats


def observed(sessions: Sessions, until_s: float) -> Observed:
    past = sessions.time_s <= until_s
    returns = sessions.next_s <= until_s
    ends_s = np.where(returns, sessions.next_s, until_s)
    last = bins_of(np.maximum(ends_s - sessions.time_s, 0))
    lived = np.where(past, np.minimum(last + 1, NUM_BINS), 0)
    tips = np.repeat(np.arange(lived.size), lived)
    ages = np.concatenate([np.arange(each) for each in lived])
    is_last = ages == last[tips]
    reused = returns[tips] & is_last
    return Observed(tips, ages, reused, np.where(is_last & ~reused, 0.5, 1.0))


def by_trees(rows: Observed, features: Floats, asked: Floats, learned: Learned) -> Floats:
    """Hazards [tips, bins] of features [tips, ...], by boosted trees of what was observed."""
    import lightgbm

    settings = {
        "objective": "binary", "learning_rate": 0.03, "num_leaves": learned.leaves,
        "min_data_in_leaf": 80, "feature_fraction": 0.7, "bagging_fraction": 0.7,
        "bagging_freq": 1, "verbose": -1, "seed": learned.seed,
    }  # fmt: skip
    given = np.column_stack([features[rows.tips], rows.ages])
    data = lightgbm.Dataset(given, rows.reused, weight=rows.weights)
    trees = lightgbm.train(settings, data, learned.rounds)
    ages = np.tile(np.arange(NUM_BINS), len(asked))
    found = trees.predict(np.column_stack([np.repeat(asked, NUM_BINS, 0), ages]))
    return np.asarray(found).reshape(-1, NUM_BINS)


def foretold(sessions: Sessions, features: Floats, seed: int) -> Floats:
    """Scores by trees of the whole trace: each fold of sessions by those of the other folds."""
    rows = observed(sessions, sessions.time_s[-1])
    fold = (sessions.root * 2654435761 % 2**32 // 7) % FOLDS
    hazards = np.zeros((fold.size, NUM_BINS))
    for number in range(FOLDS):
        is_other, mine = fold[rows.tips] != number, fold == number
        others = Observed(
            rows.tips[is_other], rows.ages[is_other], rows.reused[is_other], rows.weights[is_other]
        )
        learned = Learned(leaves=12, rounds=300, seed=seed)
        hazards[mine] = by_trees(others, features, features[mine], learned)
    return index_of(hazards, EDGES)


def learned_online(sessions: Sessions, features: Floats, seed: int) -> Floats:
    """Scores by trees that are learned anew every minute from what has happened by then: of each
    tip and age bin, by those of the minute in which the tip grows that old.

    Fewer and smaller trees than of the whole trace: the best of those tried on this trace.
    """
    scores = np.full((sessions.time_s.size, NUM_BINS), 1e-3)
    begins_s = sessions.time_s[:, None] + EDGES[None, :-1]
    for until_s in np.arange(RETRAIN_S, sessions.time_s[-1] + RETRAIN_S, RETRAIN_S):
        rows = observed(sessions, until_s)
        now = (begins_s > until_s) & (begins_s <= until_s + RETRAIN_S)
        asked = now.any(axis=1)
        if rows.reused.any() and asked.any():
            learned = Learned(leaves=6, rounds=150, seed=seed)
            fresh = index_of(by_trees(rows, features, features[asked], learned), EDGES)
            scores[asked] = np.where(now[asked], fresh, scores[asked])
    return scores


def features_of(trace: Trace, sessions: Sessions) -> Floats:
    """What a policy could know of a request at its end [requests, 8]."""
    prompt = np.array([each.num_tokens for each in trace.requests], float)
    answer = np.array([each.num_output_tokens for each in trace.requests], float)
    before, follows = sessions.parent, sessions.parent >= 0
    length = np.diff(sessions.starts)
    said = np.where(follows, prompt - prompt[before] - answer[before], -1e5)
    pause_s = np.where(follows, sessions.time_s - sessions.time_s[before], np.nan)
    new = prompt - np.where(follows, sessions.known * trace.block_tokens, 0)
    given_up = np.where(follows, length[before] - sessions.known, 0)
    columns = (
        sessions.turn, np.log2(np.maximum(new, 0) + 1), np.log2(answer + 1), np.log2(prompt + 1),
        length, np.sign(said) * np.log2(np.abs(said) + 1), np.log2(pause_s), given_up,
    )  # fmt: skip
    return np.column_stack(columns)


def rows_of(trace: Trace, sessions: Sessions) -> dict[str, list[Floats]]:
    """What is known -> scores [tips, bins], one for each seed."""
    everybody = np.ones(sessions.time_s.size, bool)
    wait_s = sessions.next_s - sessions.time_s
    returns = np.isfinite(wait_s)
    by_turn, if_known = np.zeros((2, wait_s.size, NUM_BINS))
    turns = np.minimum(sessions.turn, MOST_TURNS)
    for turn in range(1, MOST_TURNS + 1):
        by_turn[turns == turn] = counted(sessions, turns == turn)
    if_known[returns] = counted(sessions, returns)
    features = features_of(trace, sessions)
    by_age = np.tile(counted(sessions, everybody), (wait_s.size, 1))
    soonest = np.tile(-np.where(returns, sessions.next_s, 1e9)[:, None], (1, NUM_BINS))

    def trees(learn: Callable[[Sessions, Floats, int], Floats], given: Floats) -> list[Floats]:
        return [learn(sessions, given, seed) for seed in range(SEEDS)]

    return {
        "age": [index_of(by_age, EDGES)],
        "age and turn": [index_of(by_turn, EDGES)],
        "trees: turn, lengths, new tokens": trees(foretold, features[:, :5]),
        "trees: and what the user said, pause, given up": trees(foretold, features),
        "the same, learned online": trees(learned_online, features),
        "whether it comes back, not when": [index_of(if_known, EDGES)],
        "when it comes back": [soonest],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--capacity", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3])
    args = parser.parse_args()
    trace = read(args.trace)
    sessions = sessions_of(trace)
    is_shared = np.bincount(sessions.blocks, minlength=sessions.num_blocks) >= SHARED_USES
    table = Table("what is known", *(f"{share:.0%}" for share in args.capacity))
    for name, of_seeds in rows_of(trace, sessions).items():
        cells = [name]
        for share in args.capacity:
            hits = [
                hits_of(
                    int(share * sessions.num_blocks), scores, EDGES, sessions.time_s,
                    sessions.starts, sessions.blocks, sessions.num_kept, sessions.parent, is_shared,
                )
                for scores in of_seeds
            ]  # fmt: skip
            cells.append(f"{np.mean(hits) / sessions.blocks.size:.4f}")
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    main()
