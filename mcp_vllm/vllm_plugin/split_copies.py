"""Copies between KV blocks and host chunks where some of the layers are at a stage.

Which layers these are changes while the engine serves (`place`); where a layer's pages lie in a
host chunk does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from vllm.v1.kv_cache_interface import group_kernel_blocks
from vllm.v1.kv_offload.base import CanonicalKVCaches
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

from mcp_vllm.vllm_plugin.cpu_worker import HostCopyWorker, Move
from mcp_vllm.vllm_plugin.remote_layers import Pages, RemoteLayers


def pages_of(kv_cache: torch.Tensor, num_blocks: int, page_bytes: int) -> Pages:
    """A layer's KV cache in host memory as its bytes, uint8 [block, page_bytes], shared."""
    by_block = group_kernel_blocks(kv_cache, num_blocks)
    size = by_block.element_size()
    flat = torch.tensor([], dtype=torch.uint8).set_(
        by_block.untyped_storage(),
        by_block.storage_offset() * size,
        (num_blocks, page_bytes),
        (by_block.stride(0) * size, 1),
    )
    return flat.numpy()


class SplitCopyWorker(HostCopyWorker):
    """
    Args:
        names: of each group, layers that were the engine's own at first, as `kv_caches` has them,
            and those that were not.
    """

    def __init__(
        self,
        kv_caches: CanonicalKVCaches,
        blocks_per_chunk: int,
        region: SharedOffloadRegion,
        names: Sequence[tuple[Sequence[str], Sequence[str]]],
        remote: RemoteLayers,
    ) -> None:
        super().__init__(kv_caches, blocks_per_chunk, region)
        self._pages.clear()  # `place` gives the engine's own, which change
        self._remote = remote
        self._num_blocks = len(kv_caches.tensors[0].tensor)
        away = region.create_next_worker_view(remote.block_bytes * blocks_per_chunk)
        by_slot = away.numpy().reshape(
            len(away), remote.num_slots, blocks_per_chunk, remote.page_bytes
        )
        # Layer names of each group, and where their pages lie: [chunk, place in it, byte].
        self._slots: list[dict[str, np.ndarray]] = []
        for (own, others), refs in zip(names, self._refs, strict=True):
            slots = {name: self._chunks[r.tensor_idx] for name, r in zip(own, refs, strict=True)}
            slots |= {name: by_slot[:, slot] for slot, name in enumerate(others)}
            self._slots.append(slots)
        self._here: dict[str, Pages] = {}

    def place(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """The layers that are here from now on; the others are not."""
        self._here = {
            name: pages_of(each, self._num_blocks, self._remote.page_bytes)
            for name, each in kv_caches.items()
        }

    def shutdown(self) -> None:
        self._slots.clear()
        self._here.clear()
        super().shutdown()

    def _store(self, group: int, move: Move) -> int:
        slots = self._slots[group]
        away = [name for name in slots if name not in self._here]
        for name, slot in slots.items():
            if name in self._here:
                slot.view(np.uint8)[move.chunks, move.places] = self._here[name][move.blocks]
        if away:
            pages = self._remote.pages.read(away, move.blocks.tolist())
            for name, of_layer in zip(away, pages, strict=True):
                slots[name].view(np.uint8)[move.chunks, move.places] = of_layer
        return self._num_bytes(group, move)

    def _load(self, group: int, move: Move) -> int:
        slots = self._slots[group]
        away = [name for name in slots if name not in self._here]
        for name, slot in slots.items():
            if name in self._here:
                self._here[name][move.blocks] = slot.view(np.uint8)[move.chunks, move.places]
        if away:
            pages = [slots[name].view(np.uint8)[move.chunks, move.places] for name in away]
            self._remote.pages.write(away, move.blocks.tolist(), np.stack(pages))
        return self._num_bytes(group, move)

    def _num_bytes(self, group: int, move: Move) -> int:
        return len(move.blocks) * len(self._slots[group]) * self._remote.page_bytes
