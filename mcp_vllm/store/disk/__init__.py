"""The disk tier: compressed frames in append-only segment files, under a byte budget."""

from mcp_vllm.store.disk.entry import StoredFrame
from mcp_vllm.store.disk.segment import DiskError, Record
from mcp_vllm.store.disk.store import DiskSize, DiskStore, Use
from mcp_vllm.store.disk.tier import DiskTier

__all__ = ["DiskError", "DiskSize", "DiskStore", "DiskTier", "Record", "StoredFrame", "Use"]
