"""SmartCache as the policy of vLLM's primary tier, the host chunks.

vLLM's manager owns the chunks and asks which to give up; the connector says what requests use,
since it knows their whole chains when they arrive, and how they ended. Everything runs in the
scheduler's thread: reading a chunk's state is a look into a dictionary, and new chunks are told to
SmartCache a run at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.v1.kv_offload.base import OffloadKey, ReqContext, get_offload_group_idx
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus

from mcp_vllm.link.prefill import PrefillCost, contexts_of
from mcp_vllm.store.smart_cache import SmartCache, load_kernels
from mcp_vllm.vllm_plugin.session import tenant_of

logger = logging.getLogger(__name__)

# A chunk behind a long context is worth at most so many at its beginning: the cost is a fit.
MAX_CONTEXT_FACTOR = 100.0


class _Place(NamedTuple):
    """Where a chunk that may come stands. `worth`: its prefill, in tokens without a context."""

    parent: OffloadKey | None
    tenant: str
    worth: float


@dataclass
class _Request:
    """`chains` are as the scheduler goes on to fill them, one a KV cache group; `missed` are keys
    that it may store."""

    chains: Sequence[Sequence[OffloadKey]]
    chunk_tokens: Sequence[int]
    since_s: float
    cost: PrefillCost | None
    missed: list[OffloadKey] = field(default_factory=list)


class SmartCachePolicy(CachePolicy):
    """See the module's docstring; the connector calls `begin`, `finish`, `forget`, vLLM the rest.

    All chunks have one size, so the budget counts chunks.
    """

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        started_s = time.perf_counter()
        load_kernels()
        logger.info("SmartCache is ready after %.1f s", time.perf_counter() - started_s)
        self._cache: SmartCache[OffloadKey] = SmartCache(cache_capacity, cache_capacity)
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        # Those that are being written or read.
        self._busy: set[OffloadKey] = set()
        self._requests: dict[str, _Request] = {}
        # Of keys that were missed, until they come or their request ends.
        self._places: dict[OffloadKey, _Place] = {}
        # Came since SmartCache was told last.
        self._fresh: dict[OffloadKey, _Place] = {}

    # ---- called by the connector ------------------------------------------------------------

    def begin(
        self,
        request_id: str,
        chains: Sequence[Sequence[OffloadKey]],
        chunk_tokens: Sequence[int],
        cost: PrefillCost | None,
    ) -> None:
        """A request was added with these chains, one a KV cache group, which may grow."""
        self._tell_fresh()
        request = _Request(chains, chunk_tokens, time.monotonic(), cost)
        self._requests[request_id] = request
        for chain in chains:
            self._cache.access(chain)

    def finish(
        self, request_id: str, chains: Sequence[Sequence[OffloadKey]], num_output_tokens: int
    ) -> None:
        """The request has ended; these are its chains as far as they were computed."""
        request = self._requests.get(request_id)
        if request is not None:
            self._tell_fresh()
            for chain in chains:
                self._cache.access(
                    chain, num_output_tokens=num_output_tokens, since_s=request.since_s
                )

    def forget(self, request_ids: Iterable[str]) -> None:
        """Nothing of these requests is stored any more."""
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            for key in request.missed if request is not None else ():
                self._places.pop(key, None)

    # ---- called by vLLM's manager -----------------------------------------------------------

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        return self._chunks.get(key)

    def insert(self, key: OffloadKey, chunk: ChunkStatus) -> None:
        self._chunks[key] = chunk
        if chunk.ref_cnt:
            self._busy.add(key)
        self._fresh[key] = self._places.pop(key, _Place(None, "", 1.0))

    def remove(self, key: OffloadKey) -> None:
        del self._chunks[key]
        self._busy.discard(key)
        if self._fresh.pop(key, None) is None:
            self._cache.remove(key)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Nothing: `begin` and `finish` say what a request uses, and in which order."""

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Note where these stand: `insert` is not told whose they are."""
        request = self._requests.get(req_context.req_id)
        if request is not None:
            tenant = tenant_of(req_context.kv_transfer_params)
            for key in keys:
                end = req_context.get_offload_key_position(key)
                if end is not None:
                    request.missed.append(key)
                    self._places[key] = _place(request, key, end, tenant)

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        """Nothing: these are what the request loaded and stored, `finish` had all that it used."""

    def evict(
        self, n: int, protected: set[OffloadKey]
    ) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        if not n:
            return []
        self._tell_fresh()
        room = n + self.cache_capacity - len(self._cache)
        victims = self._cache.evict(room, room, protected=self._guarded(protected))
        if victims is None:
            return None
        return [(key, self._chunks.pop(key)) for key in victims]

    def clear(self) -> None:
        """What was learned stays."""
        self._chunks.clear()
        self._busy.clear()
        self._fresh.clear()
        self._places.clear()
        self._cache.clear()

    def mark_evictable(self, key: OffloadKey) -> None:
        self._busy.discard(key)

    def mark_non_evictable(self, key: OffloadKey) -> None:
        self._busy.add(key)

    # ---- our own ----------------------------------------------------------------------------

    def _guarded(self, protected: Collection[OffloadKey]) -> set[OffloadKey]:
        """What must not leave now: also the chunks that those to come are useless without."""
        places = map(self._places.get, protected)
        parents = {place.parent for place in places if place is not None}
        return {key for key in self._busy.union(protected, parents) if key in self._chunks}

    def _tell_fresh(self) -> None:
        if not self._fresh:
            return
        fresh, self._fresh = self._fresh, {}
        for keys in _runs(fresh):
            first = fresh[keys[0]]
            worth = [fresh[key].worth for key in keys]
            admission = self._cache.offer(
                keys, [1] * len(keys), worth, parent=first.parent, tenant=first.tenant
            )
            if admission.evicted:  # they stay with vLLM, and can't be given up any more
                logger.error("vLLM had made no room for %d chunks", len(admission.evicted))


def _runs(fresh: dict[OffloadKey, _Place]) -> Iterator[list[OffloadKey]]:
    """The keys in runs of which each is the child of the one before."""
    run: list[OffloadKey] = []
    for key, place in fresh.items():
        if run and place.parent != run[-1]:
            yield run
            run = []
        run.append(key)
    if run:
        yield run


def _place(request: _Request, key: OffloadKey, end: int, tenant: str) -> _Place:
    group = get_offload_group_idx(key)
    tokens = request.chunk_tokens[group]
    number = -(-end // tokens) - 1
    chain = request.chains[group]
    parent = chain[number - 1] if 0 < number <= len(chain) else None
    worth = float(tokens)
    cost = request.cost
    if cost is not None and cost.is_sound:
        contexts = cost.context_s * contexts_of(max(0, end - tokens), end)
        worth = min(worth + contexts / cost.token_s, worth * MAX_CONTEXT_FACTOR)
    return _Place(parent, tenant, worth)
