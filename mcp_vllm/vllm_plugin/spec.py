"""vLLM's tiered offloading spec, made to run where the KV cache is host memory too."""

from __future__ import annotations

import os
from dataclasses import replace

from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingManager, OffloadingWorker
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.gpu_worker import CPUOffloadingWorker
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from mcp_vllm.vllm_plugin.cpu_worker import HostCopyWorker
from mcp_vllm.vllm_plugin.remote_layers import announced
from mcp_vllm.vllm_plugin.split_copies import SplitCopyWorker


class MCPOffloadingSpec(TieringOffloadingSpec):
    """On CUDA and XPU vLLM's own copies; on CPU the same with our copy worker."""

    _name_dropped = False

    def __init__(self, config: OffloadingConfig) -> None:
        self._remote = announced()
        if self._remote is not None:
            # Behind the engine's own layers a chunk has room for those elsewhere.
            whole = config.worker_kv_bytes_per_block + self._remote.block_bytes
            config = replace(config, worker_kv_bytes_per_block=whole)
        super().__init__(config)

    def get_manager(self) -> OffloadingManager:
        manager = super().get_manager()
        region = self._scheduler_mmap
        if region is not None and not region._creator and not self._name_dropped:
            # The workers made the file, and all have mapped it before the scheduler exists: with
            # its name gone nothing is left in shared memory, however the engine ends.
            self._name_dropped = True
            os.unlink(region.mmap_path)
        return manager

    def create_worker(self, kv_caches: CanonicalKVCaches) -> CPUOffloadingWorker:
        worker = super().create_worker(kv_caches)
        worker._mmap_region._creator = False  # the scheduler's side drops the name
        return worker

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        if self._worker is None:
            self._worker = self._host_copy_worker(kv_caches)
        return self._worker

    def _host_copy_worker(self, kv_caches: CanonicalKVCaches) -> HostCopyWorker:
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=0 if self.replicated_layout else self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        region._creator = False
        try:
            if self._remote is None:
                return HostCopyWorker(kv_caches, self.blocks_per_chunk, region)
            away = self._remote.groups
            names = [(group.layer_names, away[group.group_id]) for group in self.config.groups]
            return SplitCopyWorker(kv_caches, self.blocks_per_chunk, region, names, self._remote)
        except Exception:
            region.cleanup()
            raise
