"""Host chunks of a split engine: what is stored comes back, wherever its layers are meanwhile."""

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from mcp_vllm.vllm_plugin.remote_layers import RemoteLayers
from mcp_vllm.vllm_plugin.split_copies import SplitCopyWorker

BLOCKS, PAGE, CHUNKS, PER_CHUNK = 12, 64, 5, 2
# Two groups: their first layers share the engine's one tensor; "c" and "d", "e" are elsewhere.
NAMES = [(["a"], ("c",)), (["b"], ("d", "e"))]


class Stage:
    """The KV of layers elsewhere."""

    def __init__(self) -> None:
        self.kv = {name: np.zeros((BLOCKS, PAGE), np.uint8) for name in "cde"}

    def read(self, layers, blocks):
        return np.stack([self.kv[name][blocks] for name in layers])

    def write(self, layers, blocks, pages):
        for name, of_layer in zip(layers, pages, strict=True):
            self.kv[name][blocks] = of_layer


class Region:
    """Host chunks as vLLM's region lays them out: one part of a row after the other."""

    def __init__(self, row_bytes: int) -> None:
        self.rows = torch.zeros(CHUNKS, row_bytes, dtype=torch.int8)
        self._taken = 0

    def create_next_worker_view(self, size: int) -> torch.Tensor:
        self._taken += size
        return self.rows[:, self._taken - size : self._taken]


def kv_cache(seed: int) -> torch.Tensor:
    """[block, K or V, 8, 2] of 16-bit floats: PAGE bytes a block."""
    return torch.randn(BLOCKS, 2, 8, 2, generator=torch.Generator().manual_seed(seed)).half()


def bytes_of(cache: torch.Tensor) -> np.ndarray:
    return cache.view(torch.uint8).numpy().reshape(BLOCKS, PAGE)


def made(stage: Stage, shared: torch.Tensor) -> SplitCopyWorker:
    tensor = shared.view(torch.int8).reshape(BLOCKS, PAGE)
    caches = CanonicalKVCaches(
        tensors=[CanonicalKVCacheTensor(tensor, PAGE)],
        group_data_refs=[[CanonicalKVCacheRef(0, PAGE)], [CanonicalKVCacheRef(0, PAGE)]],
    )
    remote = RemoteLayers(tuple(each[1] for each in NAMES), PAGE, stage)
    row_bytes = (PAGE + remote.block_bytes) * PER_CHUNK
    worker = SplitCopyWorker(caches, PER_CHUNK, Region(row_bytes), NAMES, remote)
    worker.place({"a": shared, "b": shared})
    return worker


def spec(blocks: list[int], sizes: tuple[int, int], firsts: tuple[int, int]) -> GPULoadStoreSpec:
    return GPULoadStoreSpec(blocks, group_sizes=sizes, block_indices=firsts)


@pytest.mark.parametrize("moved", [None, "c is here", "all are here"])
def test_what_was_stored_is_loaded_into_other_blocks_wherever_layers_are(moved):
    rng = np.random.default_rng(0)
    stage, shared = Stage(), kv_cache(0)
    for pages in stage.kv.values():
        pages[:] = rng.integers(0, 256, pages.shape)
    worker = made(stage, shared)
    # Group 0: blocks 3, 4, 5 of a request from its second on, so the first chunk is half full.
    assert worker.submit_store(
        1, spec([3, 4, 5, 7, 8], (3, 2), (1, 0)), CPULoadStoreSpec([0, 1, 4])
    )
    expected = {name: pages.copy() for name, pages in stage.kv.items()}
    expected["ab"] = bytes_of(shared).copy()
    here = {"a": shared, "b": shared}
    if moved is not None:
        here["c"] = kv_cache(1)
    if moved == "all are here":
        here |= {"d": kv_cache(2), "e": kv_cache(3)}
    worker.place(here)
    assert worker.submit_load(
        2, CPULoadStoreSpec([0, 1, 4]), spec([9, 10, 11, 0, 1], (3, 2), (1, 0))
    )
    now = {name: bytes_of(here[name]) if name in here else stage.kv[name] for name in "cde"}
    np.testing.assert_array_equal(bytes_of(shared)[[9, 10, 11]], expected["ab"][[3, 4, 5]])
    np.testing.assert_array_equal(bytes_of(shared)[[0, 1]], expected["ab"][[7, 8]])
    np.testing.assert_array_equal(now["c"][[9, 10, 11]], expected["c"][[3, 4, 5]])
    for name in "de":
        np.testing.assert_array_equal(now[name][[0, 1]], expected[name][[7, 8]])
    moved_bytes = PAGE * (3 * 2 + 2 * 3)
    assert [each.transfer_size for each in worker.get_finished()] == [moved_bytes] * 2
