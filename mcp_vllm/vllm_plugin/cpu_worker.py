"""Copies between the KV cache and the host chunks on platforms whose KV cache is host memory.

vLLM's own worker needs CUDA or XPU streams; here a copy is a memcpy, done when it is submitted.
Layout of a host chunk (as in vLLM's worker): for each KV cache tensor in turn, `blocks_per_chunk`
pages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion


class Move(NamedTuple):
    """Int arrays [block]: KV blocks, the host chunks that are theirs, and their places in these."""

    blocks: np.ndarray
    chunks: np.ndarray
    places: np.ndarray


class HostCopyWorker(OffloadingWorker):
    """One per worker process; every job has ended when its submit returns.

    Args:
        kv_caches: the engine's KV cache tensors, one page a block.
        blocks_per_chunk: KV blocks in one host chunk.
        region: this worker's part of the host chunks; closed by `shutdown`.
    """

    def __init__(
        self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion
    ) -> None:
        self._blocks_per_chunk = blocks_per_chunk
        self._region = region
        self._refs = kv_caches.group_data_refs
        self._pages: list[np.ndarray] = []
        self._chunks: list[np.ndarray] = []
        for cache in kv_caches.tensors:
            pages = cache.tensor.view(cache.tensor.dtype).numpy()
            host = region.create_next_worker_view(cache.page_size_bytes * blocks_per_chunk)
            num_chunks = host.shape[0]
            shape = (num_chunks, blocks_per_chunk, cache.page_size_bytes)
            self._pages.append(pages)
            self._chunks.append(host.numpy().reshape(shape))
        self._finished: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        """Copy KV blocks to host chunks."""
        started_s = time.perf_counter()
        num_bytes = 0
        for group, move in self._moves(src_spec, dst_spec):
            num_bytes += self._store(group, move)
        self._finish(job_id, num_bytes, started_s)
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Copy host chunks to KV blocks."""
        started_s = time.perf_counter()
        num_bytes = 0
        for group, move in self._moves(dst_spec, src_spec):
            num_bytes += self._load(group, move)
        self._finish(job_id, num_bytes, started_s)
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Every submitted job has ended already."""

    def shutdown(self) -> None:
        self._pages.clear()
        self._chunks.clear()
        self._region.cleanup()

    def _store(self, group: int, move: Move) -> int:
        """Copy a group's blocks to host chunks; how many bytes."""
        for ref in self._refs[group]:
            tensor, size = ref.tensor_idx, ref.page_size_bytes
            pages = self._pages[tensor][move.blocks, :size]
            self._chunks[tensor][move.chunks, move.places, :size] = pages
        return self._num_bytes(group, move)

    def _load(self, group: int, move: Move) -> int:
        """The other way."""
        for ref in self._refs[group]:
            tensor, size = ref.tensor_idx, ref.page_size_bytes
            pages = self._chunks[tensor][move.chunks, move.places, :size]
            self._pages[tensor][move.blocks, :size] = pages
        return self._num_bytes(group, move)

    def _num_bytes(self, group: int, move: Move) -> int:
        return len(move.blocks) * sum(ref.page_size_bytes for ref in self._refs[group])

    def _moves(self, device: GPULoadStoreSpec, host: LoadStoreSpec) -> Iterator[tuple[int, Move]]:
        """What is to be moved of each group."""
        assert isinstance(host, BlockIDsLoadStoreSpec)
        per_chunk = self._blocks_per_chunk
        block_at = chunk_at = 0
        sizes = zip(device.group_sizes, device.block_indices, strict=True)
        assert len(self._refs) == len(device.group_sizes)
        for group, (num_blocks, first_index) in enumerate(sizes):
            if num_blocks == 0:
                continue
            positions = first_index % per_chunk + np.arange(num_blocks)
            num_chunks = int(positions[-1]) // per_chunk + 1
            blocks = device.block_ids[block_at : block_at + num_blocks]
            chunks = host.block_ids[chunk_at : chunk_at + num_chunks][positions // per_chunk]
            block_at += num_blocks
            chunk_at += num_chunks
            yield group, Move(blocks, chunks, positions % per_chunk)
        assert block_at == len(device.block_ids), "blocks left over"
        assert chunk_at == len(host.block_ids), "host chunks left over"

    def _finish(self, job_id: int, num_bytes: int, started_s: float) -> None:
        elapsed_s = time.perf_counter() - started_s
        self._finished.append(TransferResult(job_id, True, num_bytes, elapsed_s))
