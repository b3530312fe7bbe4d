"""Mapping tokens to KV slots on one thread, where an engine and its stage share a machine.

Both do it at the same moment, before a step's first layer, and vLLM's kernel does so little of it
in parallel that waking a thread for it, on the core where the other side computes, takes longer: a
millisecond of a decode step of Gemma-3-270m, whose layers are of several KV groups.
"""

from __future__ import annotations

from vllm.v1.worker.block_table import MultiGroupBlockTable

from mcp_vllm.split.engine.cores import alone

_compute_slot_mapping = MultiGroupBlockTable.compute_slot_mapping


def map_slots_alone() -> None:
    """From now on, in this process."""
    MultiGroupBlockTable.compute_slot_mapping = alone(_compute_slot_mapping)
