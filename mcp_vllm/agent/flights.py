"""Which chunks are on their way to this host: nobody fetches one that somebody else is fetching."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from mcp_vllm.store.ram import ChunkKey


class Flights:
    """One per agent, owned by its event loop."""

    def __init__(self) -> None:
        self._landed: dict[ChunkKey, asyncio.Future[None]] = {}

    @contextlib.contextmanager
    def claim(self, names: Sequence[ChunkKey]) -> Iterator[list[ChunkKey]]:
        """Claim those of `names` that nobody is fetching; they are in flight until the end.

        Gives the claimed ones, in order. For the others: `wait`, then look whether they came.
        """
        claimed = [name for name in names if name not in self._landed]
        loop = asyncio.get_running_loop()
        for name in claimed:
            self._landed[name] = loop.create_future()
        try:
            yield claimed
        finally:
            for name in claimed:
                self._landed.pop(name).set_result(None)

    async def wait(self, name: ChunkKey) -> None:
        """Until nobody is fetching it (any more)."""
        landed = self._landed.get(name)
        if landed is not None:
            await asyncio.shield(landed)
