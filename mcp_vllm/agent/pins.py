"""Pinned sessions: their chunks stay in memory until a time, as far as they are there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from mcp_vllm.session.manifest import Manifest, SessionKey
from mcp_vllm.store.ram import ChunkKey, RamStore

# Pinned chunks may hold this share of the memory: the rest is for everybody else.
MAX_SHARE = 0.5


@dataclass
class _Pin:
    names: list[ChunkKey]
    until_s: float
    expiry: asyncio.TimerHandle


class SessionPins:
    """One per agent, owned by its event loop. Times are seconds since the epoch."""

    def __init__(
        self,
        store: RamStore,
        names_of: Callable[[Manifest], list[ChunkKey]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._names_of = names_of
        self._clock = clock
        self._pins: dict[SessionKey, _Pin] = {}

    def until_s(self, key: SessionKey) -> float | None:
        """Until when the session is pinned; None when it is not."""
        pin = self._pins.get(key)
        return pin.until_s if pin else None

    def pin(self, manifest: Manifest, ttl_s: float) -> bool:
        """Pin for that long from now, in place of an earlier pin; False when memory forbids it."""
        names = self._names_of(manifest)
        self._store.unpin(self._names(manifest.key))
        if not self._store.pin(names, MAX_SHARE):
            self._store.pin(self._names(manifest.key), MAX_SHARE)
            return False
        previous = self._pins.pop(manifest.key, None)
        if previous is not None:
            previous.expiry.cancel()
        expiry = asyncio.get_running_loop().call_later(ttl_s, self.unpin, manifest.key)
        self._pins[manifest.key] = _Pin(names, self._clock() + ttl_s, expiry)
        return True

    def unpin(self, key: SessionKey) -> bool:
        """End a pin; whether there was one."""
        pin = self._pins.pop(key, None)
        if pin is not None:
            pin.expiry.cancel()
            self._store.unpin(pin.names)
        return pin is not None

    def grow(self, manifest: Manifest) -> None:
        """The session has another chain: pin that instead, if it is pinned and memory allows."""
        pin = self._pins.get(manifest.key)
        if pin is not None:
            self.pin(manifest, max(0.0, pin.until_s - self._clock()))

    def _names(self, key: SessionKey) -> list[ChunkKey]:
        pin = self._pins.get(key)
        return pin.names if pin else []
