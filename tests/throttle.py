"""A TCP proxy that lets a settable number of bytes a second through, in each direction."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

SLICE_BYTES = 16 << 10


class Throttle:
    """Listens at `address`, forwards to a target.

    Attributes:
        bytes_s: may be changed at any time.
    """

    def __init__(self, target: str, bytes_s: float) -> None:
        self.set_target(target)
        self.bytes_s = bytes_s
        self.address = ""
        self._tasks: set[asyncio.Task[None]] = set()

    def set_target(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)

    def cut(self) -> None:
        """Break every connection that is open now."""
        for task in self._tasks:
            task.cancel()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Throttle]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=SLICE_BYTES)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        ends = [writer]
        try:
            there = await asyncio.open_connection(self._host, self._port, limit=SLICE_BYTES)
            ends.append(there[1])
            async with asyncio.TaskGroup() as both:
                both.create_task(self._forward(reader, there[1]))
                both.create_task(self._forward(there[0], writer))
        except (OSError, asyncio.CancelledError, ExceptionGroup):
            pass  # either side is gone, or the cable was cut
        finally:
            for end in ends:
                end.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        due_s = time.monotonic()
        while part := await reader.read(SLICE_BYTES):
            due_s = max(due_s, time.monotonic()) + len(part) / self.bytes_s
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            writer.write(part)
            await writer.drain()
        writer.write_eof()
