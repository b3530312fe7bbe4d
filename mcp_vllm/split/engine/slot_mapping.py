"""Mapping tokens to KV slots on one thread, where an engine and its stage share a machine.

Both do it at the same moment, before a step's first layer, and of a decode step vLLM's kernel does
so little of it in parallel that waking a thread, on the core where the other side computes, takes
longer: a millisecond with Gemma-3-270m, whose layers are of several KV groups.
"""

from __future__ import annotations

import torch
from vllm.v1.worker.block_table import MultiGroupBlockTable

from mcp_vllm.split.engine.openmp import alone

# More is worth another thread.
_FEW_TOKENS = 256
_on_all_threads = MultiGroupBlockTable.compute_slot_mapping


def map_slots_alone() -> None:
    """From now on, in this process, in steps of few tokens."""
    on_one_thread = alone(_on_all_threads)

    def compute_slot_mapping(
        self: MultiGroupBlockTable,
        num_reqs: int,
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        is_small = positions.shape[0] <= _FEW_TOKENS
        compute = on_one_thread if is_small else _on_all_threads
        compute(self, num_reqs, query_start_loc, positions)

    MultiGroupBlockTable.compute_slot_mapping = compute_slot_mapping
