"""The optimum to measure against: evict the block used furthest in the future.

Belady (IBM Systems Journal 1966), with admission: a block never used again is not kept.
"""

from __future__ import annotations

import heapq

from mcp_vllm.cache_bench.trace import Trace

_NEVER = 1 << 62


def hits_of(trace: Trace, capacity: int) -> list[int]:
    """For each request, how many leading blocks hit."""
    next_uses = _next_uses(trace)
    held: dict[int, int] = {}
    heap: list[tuple[int, int]] = []
    hits: list[int] = []
    for request, following in zip(trace.requests, next_uses, strict=True):
        count = 0
        while count < len(request.blocks) and request.blocks[count] in held:
            count += 1
        hits.append(count)
        for block, next_use in zip(request.blocks, following, strict=True):
            held.pop(block, None)
            if next_use == _NEVER:
                continue
            held[block] = next_use
            heapq.heappush(heap, (-next_use, block))
        while len(held) > capacity:
            next_use, block = heapq.heappop(heap)
            if held.get(block) == -next_use:
                del held[block]
    return hits


def _next_uses(trace: Trace) -> list[list[int]]:
    """When each block of each request is used next, as a position that puts a parent first."""
    upcoming: dict[int, int] = {}
    uses: list[list[int]] = []
    start = trace.num_accesses
    for request in reversed(trace.requests):
        start -= len(request.blocks)
        uses.append([upcoming.get(block, _NEVER) for block in request.blocks])
        upcoming.update({block: start + i for i, block in enumerate(request.blocks)})
    uses.reverse()
    return uses
