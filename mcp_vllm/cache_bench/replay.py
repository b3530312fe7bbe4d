"""Replays a trace against every policy at every capacity, and counts what hit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mcp_vllm.cache_bench import belady
from mcp_vllm.cache_bench.classics import CLASSICS
from mcp_vllm.cache_bench.trace import Trace
from mcp_vllm.store.smart_cache import SmartCache

SMART_CACHE, BELADY = "SmartCache", "Belady"
# Ablations of SmartCache: the tables of its hazard model that stay.
ABLATIONS = {
    "SmartCache, uses and age only": (),
    "SmartCache, without new blocks and turn": (1, 2),
    "SmartCache, without the answer's length": (0, 2),
    "SmartCache, without distance to the end": (0, 1),
}


@dataclass(frozen=True)
class PrefillModel:
    """What a prefill costs: linear layers at a rate, and attention that grows with position.

    Attributes:
        tokens_per_s: rate at position 0.
        doubling_tokens: position at which a token costs twice that.
    """

    tokens_per_s: float = 5000.0
    doubling_tokens: float = 32768.0

    def seconds(self, position: int, num_tokens: int) -> float:
        """Time to prefill so many tokens from a position on."""
        middle = position + num_tokens / 2
        return num_tokens / self.tokens_per_s * (1 + middle / self.doubling_tokens)


@dataclass(frozen=True)
class Score:
    """What a policy did with a trace.

    Attributes:
        capacity: blocks.
        hit_rate: hit blocks over all blocks; only leading blocks of a request hit.
        byte_hit_rate: the same in bytes, that is in tokens: a prompt's last block is not full.
        saved_prefill_s: of the hit blocks, by the `PrefillModel`.
        spent_s: of this process, deciding.
    """

    policy: str
    capacity: int
    hit_rate: float
    byte_hit_rate: float
    saved_prefill_s: float
    spent_s: float


def policies(ablate: bool) -> list[str]:
    """Names of what is replayed, in the order of the report."""
    return [*CLASSICS, SMART_CACHE, *(ABLATIONS if ablate else ()), BELADY]


def replay(
    trace: Trace,
    capacities: Sequence[int],
    names: Sequence[str],
    prefill: PrefillModel,
    on_step: Callable[[int, int], None],
) -> list[Score]:
    """Every policy at every capacity, each from an empty cache."""
    steps = len(capacities) * len(names) * len(trace.requests)
    done = 0
    scores: list[Score] = []
    for capacity in capacities:
        for name in names:
            start = time.perf_counter()
            hits: list[int] = []
            for count in _hits(trace, capacity, name):
                hits.append(count)
                done += 1
                if done % 200 == 0 or done == steps:
                    on_step(done, steps)
            spent = time.perf_counter() - start
            scores.append(_score(trace, name, capacity, hits, prefill, spent))
    return scores


def _hits(trace: Trace, capacity: int, name: str) -> Iterable[int]:
    if name == BELADY:
        return belady.hits_of(trace, capacity)
    if name in CLASSICS:
        policy = CLASSICS[name](capacity)
        return (policy.request(request.blocks) for request in trace.requests)
    return _smart_cache_hits(trace, capacity, ABLATIONS.get(name))


def _smart_cache_hits(trace: Trace, capacity: int, tables: Sequence[int] | None) -> Iterator[int]:
    now_s = 0.0
    cache: SmartCache[int] = SmartCache(capacity, capacity, clock=lambda: now_s)
    if tables is not None:
        cache.use_tables(tables)
    for request in trace.requests:
        now_s = request.time_s
        yield cache.access(request.blocks, num_output_tokens=request.num_output_tokens)
        cache.offer(request.blocks, [1] * len(request.blocks))


def _score(
    trace: Trace,
    name: str,
    capacity: int,
    hits: Sequence[int],
    prefill: PrefillModel,
    spent_s: float,
) -> Score:
    hit_tokens = all_tokens = 0
    saved_s = 0.0
    for request, count in zip(trace.requests, hits, strict=True):
        tokens = [trace.tokens_of(request, i) for i in range(len(request.blocks))]
        all_tokens += sum(tokens)
        hit_tokens += sum(tokens[:count])
        for i in range(count):
            saved_s += prefill.seconds(i * trace.block_tokens, tokens[i])
    return Score(
        name,
        capacity,
        sum(hits) / max(1, trace.num_accesses),
        hit_tokens / max(1, all_tokens),
        saved_s,
        spent_s,
    )
