"""Tells one engine what it can be given of its namespace: all of it at first, then every change.

Changes are collected for a moment, so that a commit of many chunks is one message, and a load
does not wake its engine with every chunk that it has brought there itself. Owned by the agent's
event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from mcp_vllm.link.protocol import Inventory
from mcp_vllm.store.ram import ChunkKey
from mcp_vllm.store.tiers import Tiers

# Keys in one message, well below the bound of a message.
SLICE_KEYS = 20_000
# An engine asks for what it was not told of yet.
BATCH_S = 0.01


class InventoryFeed:
    """From `start` until `stop`; `send` must not block.

    Args:
        is_readable: whether a chunk of the store can be read here: a sealed one may not.
    """

    def __init__(
        self,
        store: Tiers,
        namespace: bytes,
        send: Callable[[Inventory], None],
        is_readable: Callable[[ChunkKey], bool] = lambda name: True,
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._send = send
        self._is_readable = is_readable
        self._changes: dict[ChunkKey, bool] = {}

    def start(self) -> None:
        """Send what is there, and watch."""
        present = [
            name
            for name in self._store
            if name.namespace == self._namespace and self._is_readable(name)
        ]
        for tenant, keys in _by_tenant(present).items():
            for start in range(0, len(keys), SLICE_KEYS):
                self._send(Inventory(keys[start : start + SLICE_KEYS], [], tenant))
        self._store.watchers.append(self._changed)

    def refresh(self) -> None:
        """Other keys open frames now: say anew of every chunk whether it can be given."""
        for name in self._store:
            if name.namespace == self._namespace:
                self._note(name, self._is_readable(name))

    def stop(self) -> None:
        """Stop watching; idempotent."""
        if self._changed in self._store.watchers:
            self._store.watchers.remove(self._changed)
        self._changes.clear()

    def _changed(self, name: ChunkKey, present: bool) -> None:
        if name.namespace == self._namespace and (not present or self._is_readable(name)):
            self._note(name, present)

    def _note(self, name: ChunkKey, present: bool) -> None:
        if not self._changes:
            asyncio.get_running_loop().call_later(BATCH_S, self._flush)
        self._changes[name] = present

    def _flush(self) -> None:
        changes, self._changes = self._changes, {}
        added = _by_tenant([name for name, present in changes.items() if present])
        removed = _by_tenant([name for name, present in changes.items() if not present])
        for tenant in added | removed:
            self._send(Inventory(added.get(tenant, []), removed.get(tenant, []), tenant))


def _by_tenant(names: Sequence[ChunkKey]) -> dict[str, list[bytes]]:
    keys: dict[str, list[bytes]] = {}
    for name in names:
        keys.setdefault(name.tenant, []).append(name.key)
    return keys
