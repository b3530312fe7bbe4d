"""Tells one engine what the store has of its namespace: all of it at first, then every change.

Changes are collected until the event loop comes round, so that a commit of many chunks is one
message. Owned by the agent's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mcp_vllm.link.protocol import Inventory
from mcp_vllm.store.ram import ChunkKey, RamStore

# Keys in one message, well below the bound of a message.
SLICE_KEYS = 20_000


class InventoryFeed:
    """From `start` until `stop`; `send` must not block."""

    def __init__(
        self, store: RamStore, namespace: bytes, send: Callable[[Inventory], None]
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._send = send
        self._changes: dict[bytes, bool] = {}

    def start(self) -> None:
        """Send what is there, and watch."""
        keys = [name.key for name in self._store if name.namespace == self._namespace]
        for start in range(0, len(keys), SLICE_KEYS):
            self._send(Inventory(keys[start : start + SLICE_KEYS], []))
        self._store.watchers.append(self._changed)

    def stop(self) -> None:
        """Stop watching; idempotent."""
        if self._changed in self._store.watchers:
            self._store.watchers.remove(self._changed)
        self._changes.clear()

    def _changed(self, name: ChunkKey, present: bool) -> None:
        if name.namespace != self._namespace:
            return
        if not self._changes:
            asyncio.get_running_loop().call_soon(self._flush)
        self._changes[name.key] = present

    def _flush(self) -> None:
        changes, self._changes = self._changes, {}
        if changes:
            added = [key for key, present in changes.items() if present]
            removed = [key for key, present in changes.items() if not present]
            self._send(Inventory(added, removed))
