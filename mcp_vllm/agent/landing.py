"""Landing slots: the shared buffer through which chunks enter one engine."""

from __future__ import annotations

import asyncio
import mmap
import os

from mcp_vllm.link.shared_memory import create_memory, map_rows

MIN_SLOTS = 4


class LandingSlots:
    """Slots of equal size in memory that only the agent may write.

    A slot is taken by `acquire`, filled, named in a Landed message, and comes back by `release`.

    Attributes:
        fd: the memory's descriptor, to be passed read-only to the engine.
    """

    def __init__(self, slot_bytes: int, budget_bytes: int) -> None:
        self.slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.num_slots = max(MIN_SLOTS, budget_bytes // self.slot_bytes)
        self.fd = create_memory("mcp-landing", self.num_slots * self.slot_bytes)
        self._mapped = map_rows(self.fd, self.num_slots, self.slot_bytes, writable=True)
        # The last one used is the next: its memory is in the cache, and may be all that is touched.
        self._free = list(range(self.num_slots))[::-1]
        self._used: set[int] = set()
        self._available = asyncio.Semaphore(self.num_slots)

    async def acquire(self, count: int = 1) -> list[int]:
        """Free slots, as many as there are up to `count`; waits for the first.

        Waiting for all of them, two loads could each hold what the other waits for.
        """
        slots: list[int] = []
        while len(slots) < count and not (slots and self._available.locked()):
            await self._available.acquire()
            slots.append(self._free.pop())
            self._used.add(slots[-1])
        return slots

    def release(self, slots: list[int]) -> None:
        """Give slots back. Raises ValueError for one that is not out."""
        for slot in slots:
            if slot not in self._used:
                raise ValueError(f"landing slot {slot} is not in use")
            self._used.remove(slot)
            self._free.append(slot)
            self._available.release()

    def buffer(self, slot: int, size: int) -> memoryview:
        """Writable view of the first `size` bytes of the slot."""
        return memoryview(self._mapped.rows[slot])[:size]

    def close(self) -> None:
        self._mapped.close()
        os.close(self.fd)
