"""A TCP server on the loopback interface whose connections end with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
STREAM_LIMIT_BYTES = 1 << 16


@dataclass
class LoopbackServer:
    """`serve` handles one connection; `limit` is of its reader.

    Attributes:
        address: HOST:PORT, while it is running.
        connections: the tasks of those that are open.
    """

    serve: Serve
    limit: int = STREAM_LIMIT_BYTES
    address: str = ""
    connections: set[asyncio.Task[None]] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[LoopbackServer]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=self.limit)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await asyncio.gather(*self.connections, return_exceptions=True)

    def cut(self) -> None:
        """Cancel every connection that is open now."""
        for task in self.connections:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        task.add_done_callback(self.connections.discard)
        await self.serve(reader, writer)
