"""Connector `mcp`: vLLM's offloading connector with our spec, our tier, and sessions.

Scheduling, matching of hybrid KV groups and copies are vLLM's. Added here: our settings become the
framework's, a request's session and block hashes reach the agent as soon as the request arrives,
and the response says what was imported.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    PromMetric,
    PromMetricT,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from mcp_vllm.config import Config
from mcp_vllm.link import protocol
from mcp_vllm.link.prefill import PrefillMeter
from mcp_vllm.link.supervisor import AgentSupervisor, own_socket_path
from mcp_vllm.vllm_plugin import settings
from mcp_vllm.vllm_plugin.compat import let_modules_be_searched
from mcp_vllm.vllm_plugin.fingerprint import engine_fingerprint
from mcp_vllm.vllm_plugin.host_policy import SmartCachePolicy
from mcp_vllm.vllm_plugin.layout import group_layouts
from mcp_vllm.vllm_plugin.prefill_steps import PrefillSteps
from mcp_vllm.vllm_plugin.session import session_of
from mcp_vllm.vllm_plugin.short_polls import shorten_polls
from mcp_vllm.vllm_plugin.split_copies import SplitCopyWorker
from mcp_vllm.vllm_plugin.tier import ContextTier

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
        RequestOffloadState,
    )
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_offload.base import OffloadKey
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

let_modules_be_searched()  # policies have loaded numba

# How long the engine's start-up waits for its agent; serving starts without it after that.
START_WAIT_S = 20.0
# How long a step with nothing to compute may wait for an answer of the agent; what a request that
# arrives meanwhile waits.
IDLE_STEP_S = 0.02


class MCPConnector(OffloadingConnector):
    """See the module's docstring. One per process and role, made by vLLM."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        config = settings.complete(vllm_config.kv_transfer_config)
        super().__init__(vllm_config, role, kv_cache_config)
        if config.short_polls and current_platform.is_cpu():
            shorten_polls()
        self._supervisor: AgentSupervisor | None = None
        self._imported_tokens: dict[str, int] = {}
        self._prefill = PrefillMeter(vllm_config.scheduler_config.max_num_batched_tokens)
        self._steps = PrefillSteps(self._prefill)
        if role == KVConnectorRole.SCHEDULER:
            self._start_tier(config, vllm_config, kv_cache_config)

    @property
    def _tier(self) -> ContextTier:
        tiers = self.scheduler.manager.secondary_tiers
        return next(tier for tier in tiers if isinstance(tier, ContextTier))

    @property
    def _host_policy(self) -> SmartCachePolicy | None:
        """What decides on the host chunks, where that is not one of vLLM's own policies."""
        policy = self.scheduler.manager.primary_tier._policy
        return policy if isinstance(policy, SmartCachePolicy) else None

    def _start_tier(
        self, config: Config, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> None:
        engine_id = vllm_config.kv_transfer_config.engine_id
        tier = self._tier
        spec = tier._offloading_spec
        layouts = group_layouts(spec, kv_cache_config)
        for group in self.scheduler.config.kv_group_configs:
            layouts[group.group_idx] = msgspec.structs.replace(
                layouts[group.group_idx],
                tokens=group.tokens_per_chunk,
                window_chunks=group.sliding_window_size_in_chunks or 0,
            )

        def make_hello() -> protocol.Hello:
            fingerprint = engine_fingerprint(vllm_config, kv_cache_config, spec, layouts)
            return protocol.Hello(
                protocol=protocol.PROTOCOL_VERSION,
                engine_id=engine_id,
                pid=os.getpid(),
                fingerprint=dict(fingerprint.fields),
                chunk_bytes=spec.kv_bytes_per_chunk,
                num_chunks=spec.num_chunks,
                groups=layouts,
            )

        socket_path = config.agent.socket
        if socket_path is None:
            socket_path = own_socket_path(engine_id)
            if spec.config.parallel.data_parallel_index == 0:
                self._supervisor = AgentSupervisor(config.to_json(), str(socket_path))
        start_agent = self._supervisor.ensure_running if self._supervisor else _nothing
        tier.start(str(socket_path), make_hello, start_agent, START_WAIT_S, self._chains_of)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Of a split engine again whenever its layers have moved: then of other layers."""
        worker = self.connector_worker.worker
        if worker is None:
            super().register_kv_caches(kv_caches)
            worker = self.connector_worker.worker
        if isinstance(worker, SplitCopyWorker):
            worker.place(kv_caches)

    def drop_transfers(self) -> None:
        """Forget what was to be stored, and what was loaded and not told of: the KV blocks of a
        split engine are gone, and its scheduler starts over (split/engine/scheduler.py)."""
        self.connector_worker._unsubmitted_store_jobs.clear()
        self.connector_worker._load_jobs.clear()

    def forget_blocks(self) -> None:
        """Of requests that end, or begin anew: nothing of these blocks is to be stored."""
        for status in self.scheduler._req_status.values():
            for state in status.group_states:
                state.block_ids.clear()

    def let_go(self) -> None:
        """Hold no KV cache: other ones are about to be made."""
        worker = self.connector_worker.worker
        if isinstance(worker, SplitCopyWorker):
            worker.place({})

    def _chains_of(self, request_id: str) -> list[list[OffloadKey]]:
        status = self.scheduler._req_status.get(request_id)
        return [state.offload_keys for state in status.group_states] if status else []

    def shutdown(self) -> None:
        super().shutdown()
        if self._supervisor is not None:
            self._supervisor.stop()

    def on_new_request(self, request: Request) -> None:
        super().on_new_request(request)
        status = self.scheduler._req_status[request.request_id]
        status.update_offload_keys()
        chains = [list(state.offload_keys) for state in status.group_states]
        salted = request.cache_salt is not None
        session = session_of(request.request_id, request.kv_transfer_params)
        cost = self._prefill.cost
        if (policy := self._host_policy) is not None:
            live = [state.offload_keys for state in status.group_states]
            tokens = [group.tokens_per_chunk for group in self.scheduler.config.kv_group_configs]
            policy.begin(request.request_id, live, tokens, cost)
        self._tier.prepare(status.req_context, session, salted, chains, cost)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        self._tier.note_computed(request.request_id, num_computed_tokens)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        metadata = super().build_connector_meta(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0:
            # vLLM steps on without a pause while requests wait for us, and on a small machine takes
            # the cores that the agent needs to answer.
            self._tier.wait_for_agent(IDLE_STEP_S)
        self._steps.scheduled(scheduler_output)
        if (policy := self._host_policy) is not None:
            policy.forget(scheduler_output.finished_req_ids)
        return metadata

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self.connector_scheduler is not None:
            self._steps.ended()  # vLLM asks once for each step, when its output has come
        return super().get_kv_connector_stats()

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        # The first admission counts: vLLM calls again when the load has ended, and a preempted
        # request may load its own blocks.
        if request.request_id not in self._imported_tokens:
            self._imported_tokens[request.request_id] = num_external_tokens
            self._tier.count_imported_tokens(num_external_tokens)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        delay_free, params = super().request_finished_all_groups(request, block_ids)
        imported_tokens = self._imported_tokens.pop(request.request_id, 0)
        status = self.scheduler._req_status.get(request.request_id)
        if status is None:
            return delay_free, params
        self._offer_generated_windows(status, block_ids)
        # A request that was cancelled counts as far as it came: vLLM ends one that met a stop text
        # the same way.
        num_tokens = min(request.num_computed_tokens, request.num_tokens)
        chains = [
            state.offload_keys[: num_tokens // group.tokens_per_chunk]
            for group, state in zip(
                self.scheduler.config.kv_group_configs, status.group_states, strict=True
            )
        ]
        output_tokens = request.num_output_tokens
        if (policy := self._host_policy) is not None:
            policy.finish(request.request_id, chains, output_tokens)
        cost = self._prefill.cost
        report = self._tier.conclude(request.request_id, chains, num_tokens, output_tokens, cost)
        session = session_of(request.request_id, request.kv_transfer_params)
        imported_from = list(report.sources) or (["host"] if imported_tokens else [])
        ours = {
            "session_id": session.session_id or None,
            "imported_tokens": imported_tokens,
            "imported_from": imported_from,
            "raw_bytes": report.raw_bytes,
            "wire_bytes": report.wire_bytes,
            "import_ms": round(1000 * report.seconds, 1),
        }
        return delay_free, {**(params or {}), **ours}

    def _offer_generated_windows(
        self, status: RequestOffloadState, block_ids: tuple[list[int], ...]
    ) -> None:
        """Have the sliding windows at the end of a finished request stored.

        vLLM keeps only the windows at the end of the prompt, so a hybrid model could reuse nothing
        of an answer. The end of the request is made a boundary worth keeping, like the end of a
        shared prefix. `block_ids` is the block table at this moment, 0 for what has left a window,
        so a block that belongs to another request by now is never offered; the framework guards it
        from here.
        """
        status.req.shared_prefix_boundary = status.req.num_computed_tokens - 1
        per_chunk = self.scheduler.config.blocks_per_chunk
        for group, state in zip(
            self.scheduler.config.kv_group_configs, status.group_states, strict=True
        ):
            if not isinstance(group.kv_cache_spec, SlidingWindowSpec) or group.is_eagle_group:
                continue
            table = block_ids[group.group_idx]
            gone = max((i + 1 for i, block in enumerate(table) if block == 0), default=0)
            first_whole_chunk = -(-gone // per_chunk)
            state.block_ids[:] = table
            state.next_stored_chunk_idx = min(state.next_stored_chunk_idx, first_whole_chunk)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        settings.complete(vllm_config.kv_transfer_config)
        return super().build_prom_metrics(
            vllm_config, metric_types, labelnames, per_engine_labelvalues
        )


def _nothing() -> None:
    """The agent runs on its own."""
