"""The secondary tier behind vLLM's host chunks: a client of the context agent.

Everything here runs in the scheduler's thread and returns at once; waiting, copying and deadlines
are the link's (`mcp_vllm.link.client`). What the agent's store has is known here (Inventory). What
a peer might have is RETRY until the lookup's deadline, then a miss; without an agent everything is
a miss and nothing is stored.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadingMetricMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from mcp_vllm.codec.loss import EXACT, worst
from mcp_vllm.link import protocol
from mcp_vllm.link.client import AgentLink
from mcp_vllm.link.events import Found, JobDone, Lost
from mcp_vllm.link.prefill import PrefillCost
from mcp_vllm.link.shared_memory import reopen_read_only
from mcp_vllm.session.manifest import DEFAULT_TENANT, SessionKey
from mcp_vllm.vllm_plugin.metrics import EngineMetrics, definitions
from mcp_vllm.vllm_plugin.session import tenant_of

logger = logging.getLogger(__name__)

# A prompt with more chunks than this is looked up in parts, as the scheduler asks.
MAX_PREPARED_KEYS = 100_000
# Chunks known one by one to have been through a lossy tier.
MAX_LOSSES = 1_000_000


@dataclass
class ImportReport:
    """What the agent brought for one request; times in seconds, sizes in bytes."""

    raw_bytes: int = 0
    wire_bytes: int = 0
    seconds: float = 0.0
    sources: dict[str, None] = field(default_factory=dict)


@dataclass
class _Request:
    """Per-request state; `answers` holds what is known, `asked` what is under way."""

    answers: dict[OffloadKey, bool] = field(default_factory=dict)
    asked: set[OffloadKey] = field(default_factory=set)
    to_ask: list[OffloadKey] = field(default_factory=list)
    deadline_s: float = 0.0
    started_s: float = 0.0
    tenant: str = DEFAULT_TENANT
    prompt: list[OffloadKey] | None = None
    chains: list[list[OffloadKey]] = field(default_factory=list)
    num_tokens: int = 0
    output_tokens: int = 0
    computed_tokens: int = 0
    prefill: PrefillCost | None = None
    report: ImportReport = field(default_factory=ImportReport)


class ContextTier(SecondaryTierManager):
    """See the module's docstring. The connector calls `start`, `prepare` and `conclude`."""

    cache_hit_source = CacheHitSource.EXTERNAL_UNSPECIFIED

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        region = self._offloading_spec._scheduler_mmap
        self._host_fd = reopen_read_only(region.fd)
        self._link: AgentLink | None = None
        self._responsive = True
        self._requests: dict[str, _Request] = {}
        # What the agent has, by tenant.
        self._inventory: dict[str, set[OffloadKey]] = {}
        # What was loaded after a lossy tier; it may be in this engine's caches until it ends.
        self._losses: dict[OffloadKey, str] = {}
        self._lookups: dict[int, tuple[str, Sequence[OffloadKey]]] = {}
        self._next_lookup_id = 0
        self._jobs: dict[int, TransferJob] = {}
        self._done: list[JobResult] = []
        self._stats = OffloadingConnectorStats()
        self._losses_seen = 0

    # ---- called by the connector ------------------------------------------------------------

    def start(
        self,
        socket_path: str,
        make_hello: Callable[[], protocol.Hello],
        before_connect: Callable[[], None],
        wait_s: float,
        chains_of: Callable[[str], Iterable[Sequence[OffloadKey]]],
    ) -> None:
        """Begin to talk to the agent, and wait for it at most `wait_s`.

        `chains_of` gives a request's chains as they are now, one a KV cache group.
        """
        self._chains_of = chains_of
        host_rows = np.asarray(self._primary_kv_view).view(np.uint8)
        link = AgentLink(socket_path, make_hello, self._host_fd, host_rows, before_connect)
        self._link = link
        link.start()
        link.wait_connected(wait_s)

    def prepare(
        self,
        req_context: ReqContext,
        session: SessionKey,
        salted: bool,
        chains: list[list[OffloadKey]],
        prefill: PrefillCost | None,
    ) -> None:
        """A request was added with these chains, one a KV cache group: ask for what is not here.

        `salted`: it has a `cache_salt`, so its keys are its own and those of the same salt.
        `prefill`: what computing it would cost, where that was measured.
        """
        request = self._requests[req_context.req_id]
        request.tenant = session.tenant
        request.prompt = keys = [key for chain in chains for key in chain]
        if self._link is None or not self._link.connected:
            return
        self._link.send(
            protocol.Prepare(
                req_context.req_id, session.tenant, session.session_id or None, salted, prefill
            )
        )
        self._take_events()
        held = self._held_for(session.tenant)
        num_absent = sum(not any(key in each for each in held) for key in keys)
        if num_absent and self._link.asks_peers and len(keys) <= MAX_PREPARED_KEYS:
            request.to_ask.extend(keys)
            self._ask(req_context.req_id, request, whole=True)
            return
        self._count_lookups(len(keys) - num_absent, "hit")
        if not self._link.asks_peers:
            self._count_lookups(num_absent, "miss")

    def note_computed(self, request_id: str, num_tokens: int) -> None:
        """So many tokens of the request are in the engine's own prefix cache."""
        request = self._requests.get(request_id)
        if request is not None:
            request.computed_tokens = num_tokens

    def conclude(
        self,
        request_id: str,
        chains: list[list[OffloadKey]],
        num_tokens: int,
        output_tokens: int,
        prefill: PrefillCost | None,
    ) -> ImportReport:
        """The request has ended; its session remembers these chains. What was brought for it?

        `prefill`: what computing costs, as measured by now.
        """
        request = self._requests.get(request_id)
        if request is None:
            return ImportReport()
        request.chains, request.num_tokens, request.prefill = chains, num_tokens, prefill
        request.output_tokens = output_tokens
        return request.report

    def wait_for_agent(self, timeout_s: float) -> None:
        """Block until the agent says something that is waited for, at most that long."""
        if self._link is not None and (self._lookups or self._jobs):
            self._link.wait_event(timeout_s)

    def count_imported_tokens(self, num_tokens: int) -> None:
        self._stats.increase_counter(EngineMetrics.IMPORTED_TOKENS, num_tokens)

    # ---- called by vLLM's tiering manager ---------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self._requests[req_context.req_id] = _Request()
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        request = self._requests.get(req_context.req_id)
        if request is None or self._link is None:
            return LookupResult.MISS
        if self._lookups:
            self._take_events()
        known = request.answers.get(key)
        if known is None and any(key in held for held in self._held_for(request.tenant)):
            known = True
        if known is not None:
            return LookupResult.HIT if known else LookupResult.MISS
        link = self._link
        if not (link.connected and link.asks_peers and self._responsive):
            return LookupResult.MISS
        if key not in request.asked:
            request.asked.add(key)
            request.to_ask.append(key)
            return LookupResult.RETRY
        if request.deadline_s and time.monotonic() > request.deadline_s:
            self._give_up_lookups(request)
            return LookupResult.MISS
        return LookupResult.RETRY

    def submit_load(self, job_metadata: TransferJob) -> None:
        job_id, keys = job_metadata.job_id, list(job_metadata.keys)
        self._jobs[job_id] = job_metadata
        if self._link is None:
            self._end_job(JobDone(job_id, frozenset(range(len(keys))), causes=("no agent",)))
            return
        load = self._load_of(job_id, job_metadata.req_context, keys)
        self._link.load(load, job_metadata.chunk_ids.tolist())

    def submit_store(self, job_metadata: TransferJob) -> None:
        job_id, keys = job_metadata.job_id, list(job_metadata.keys)
        self._jobs[job_id] = job_metadata
        if self._link is None:
            self._end_job(JobDone(job_id, frozenset(range(len(keys))), causes=("no agent",)))
            return
        context = job_metadata.req_context
        request_id, tenant = context.req_id, tenant_of(context.kv_transfer_params)
        loss = self._loss_of(request_id)
        positions = self._positions(request_id, keys) if self._link.wants_positions else []
        chunk_ids = job_metadata.chunk_ids.tolist()
        self._link.send(protocol.Store(job_id, keys, chunk_ids, loss, positions, tenant))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        self._take_events()
        done, self._done = self._done, []
        return done

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        for request_id, request in self._requests.items():
            if request.to_ask:
                self._ask(request_id, request)

    def on_request_finished(self, req_context: ReqContext) -> None:
        request = self._requests.pop(req_context.req_id, None)
        if request is None or self._link is None or not self._link.connected:
            return
        chains = [list(chain) for chain in request.chains]
        self._link.send(
            protocol.Finish(
                req_context.req_id,
                chains,
                request.num_tokens,
                request.prefill,
                request.output_tokens,
            )
        )

    def drain_jobs(self) -> None:
        """Blocks until the link has ended every job, which its deadlines guarantee."""
        while self._jobs and self._link is not None:
            self._link.wait_event(1.0)
            self._take_events()

    def shutdown(self) -> None:
        if self._link is not None:
            self._link.stop()
            self._link = None
        if self._host_fd >= 0:
            os.close(self._host_fd)
            self._host_fd = -1

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        return definitions()

    def get_stats(self) -> OffloadingConnectorStats | None:
        if self._link is None:
            return None
        stats, self._stats = self._stats, OffloadingConnectorStats()
        stats.set_gauge(EngineMetrics.AGENT_UP, int(self._link.connected))
        losses = self._link.counters.disconnects
        if losses > self._losses_seen:
            stats.increase_counter(EngineMetrics.AGENT_LOSSES, losses - self._losses_seen)
            self._losses_seen = losses
        return stats

    # ---- our own ----------------------------------------------------------------------------

    def _load_of(
        self, job_id: int, req_context: ReqContext, keys: list[OffloadKey]
    ) -> protocol.Load:
        request = self._requests.get(req_context.req_id)
        ends = [req_context.get_offload_key_position(key) for key in keys]
        known = [end for end in ends if end is not None]
        return protocol.Load(
            job_id,
            req_context.req_id,
            list(keys),
            tenant_of(req_context.kv_transfer_params),
            known if len(known) == len(keys) else [],
            request.computed_tokens if request else 0,
        )

    def _ask(self, request_id: str, request: _Request, whole: bool = False) -> None:
        assert self._link is not None
        keys, request.to_ask = request.to_ask, []
        if not keys:
            return
        now_s = time.monotonic()
        request.asked.update(keys)
        request.started_s = request.started_s or now_s
        request.deadline_s = now_s + self._link.lookup_s
        lookup_id = self._next_lookup_id
        self._next_lookup_id += 1
        self._lookups[lookup_id] = (request_id, keys)
        lookup = protocol.Lookup(lookup_id, request_id, list(keys), request.tenant, whole)
        self._link.send(lookup)

    def _held_for(self, tenant: str) -> list[set[OffloadKey]]:
        """What the agent has for that tenant: its own, and what is shared."""
        shared = self._link.shared_tenants if self._link is not None else ()
        held = (self._inventory.get(each) for each in dict.fromkeys((tenant, *shared)))
        return [each for each in held if each]

    def _give_up_lookups(self, request: _Request) -> None:
        """The deadline has passed: what is unknown is a miss, and the agent is not waited for
        again until it says something."""
        self._responsive = False
        unknown = [key for key in request.asked if key not in request.answers]
        for key in unknown:
            request.answers[key] = False
        self._count_lookups(len(unknown), "timeout")

    def _take_events(self) -> None:
        if self._link is None:
            return
        for event in self._link.poll():
            self._responsive = True
            match event:
                case Found():
                    self._take_found(event)
                case JobDone():
                    self._end_job(event)
                case protocol.Inventory():
                    held = self._inventory.setdefault(event.tenant, set())
                    held.update(event.added)
                    held.difference_update(event.removed)
                    if not held:
                        del self._inventory[event.tenant]
                case Lost():
                    self._inventory.clear()

    def _take_found(self, found: Found) -> None:
        request_id, keys = self._lookups.pop(found.lookup_id, ("", ()))
        request = self._requests.get(request_id)
        if request is None or len(found.present) != len(keys):
            return
        for key, present in zip(keys, found.present, strict=True):
            request.answers.setdefault(key, bool(present))
        num_hits = sum(found.present)
        self._count_lookups(num_hits, "hit")
        self._count_lookups(len(keys) - num_hits, "miss")

    def _loss_of(self, request_id: str) -> str:
        """The worst loss in the context that the request's blocks were computed from."""
        if not self._losses:
            return EXACT
        request = self._requests.get(request_id)
        if request is None or request.prompt is None or len(self._losses) > MAX_LOSSES:
            return worst(self._losses.values())
        return worst(self._losses.get(key, EXACT) for key in request.prompt)

    def _positions(self, request_id: str, keys: Sequence[OffloadKey]) -> list[int]:
        """Of each key in the request's chain of its group; 0 where that is not known any more."""
        known = {key: at for chain in self._chains_of(request_id) for at, key in enumerate(chain)}
        return [known.get(key, 0) for key in keys]

    def _note_losses(self, keys: Sequence[OffloadKey], losses: Iterable[tuple[int, str]]) -> None:
        for index, loss in losses:
            if len(self._losses) > MAX_LOSSES:
                # From here on everything counts as lossy, by the worst tier that was seen.
                self._losses.setdefault(OffloadKey(loss.encode()), loss)
            else:
                self._losses[keys[index]] = loss

    def _count_lookups(self, num_keys: int, result: str) -> None:
        self._stats.increase_counter(EngineMetrics.LOOKUP_KEYS, num_keys, (result,))

    def _end_job(self, done: JobDone) -> None:
        job = self._jobs.pop(done.job_id, None)
        if job is None:
            return
        keys = list(job.keys)
        if job.is_promotion:
            self._record_load(job, keys, done)
        else:
            self._stats.increase_counter(EngineMetrics.STORED_BYTES, done.raw_bytes)
        self._done.append(
            JobResult(
                job.job_id,
                success=not done.failed,
                successful_keys=[k for i, k in enumerate(keys) if i not in done.failed],
                transfer_time=time.monotonic() - job.submit_time,
                transfer_bytes=done.raw_bytes,
            )
        )

    def _record_load(self, job: TransferJob, keys: Sequence[OffloadKey], done: JobDone) -> None:
        stats, m = self._stats, EngineMetrics
        stats.increase_counter(m.LOADED_CHUNKS, len(keys) - len(done.failed))
        stats.increase_counter(m.LOADED_BYTES, done.raw_bytes)
        stats.increase_counter(m.WIRE_BYTES, done.wire_bytes)
        self._note_losses(keys, done.losses)
        request = self._requests.get(job.req_context.req_id)
        if done.failed:
            cause = done.causes[0] if done.causes else "unknown"
            stats.increase_counter(m.FAILED_CHUNKS, len(done.failed), (cause,))
            logger.log(
                logging.DEBUG if cause == protocol.SLOWER else logging.WARNING,
                "request %s: %d of %d chunks could not be brought (%s), recomputing them",
                job.req_context.req_id,
                len(done.failed),
                len(keys),
                ", ".join(done.causes) or "unknown",
            )
            if request is not None:
                # Or the scheduler would ask for them again, for ever.
                request.answers.update((keys[index], False) for index in done.failed)
        if request is not None:
            report = request.report
            report.raw_bytes += done.raw_bytes
            report.wire_bytes += done.wire_bytes
            report.sources.update(dict.fromkeys(done.sources))
            report.seconds = time.monotonic() - request.started_s if request.started_s else 0.0
