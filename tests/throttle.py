"""A TCP proxy that lets a settable number of bytes a second through, in each direction."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator

from loopback_server import LoopbackServer

SLICE_BYTES = 16 << 10
BUFFER_BYTES = 64 << 10


class Throttle:
    """Listens at `address`, forwards to a target.

    Attributes:
        bytes_s: may be changed at any time.
    """

    def __init__(self, target: str, bytes_s: float) -> None:
        self.set_target(target)
        self.bytes_s = bytes_s
        self._server = LoopbackServer(self._serve, SLICE_BYTES)

    @property
    def address(self) -> str:
        return self._server.address

    def set_target(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)

    def cut(self) -> None:
        """Break every connection that is open now."""
        self._server.cut()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Throttle]:
        async with self._server.running():
            yield self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        try:
            there = await self._connected()
            ends.append(there[1])
            async with asyncio.TaskGroup() as both:
                both.create_task(self._forward(reader, there[1]))
                both.create_task(self._forward(there[0], writer))
        except (OSError, asyncio.CancelledError, ExceptionGroup):
            pass  # either side is gone, or the cable was cut
        finally:
            for end in ends:
                end.transport.abort()

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the target; the link holds back what comes from there, not the system's buffers."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (self._host, self._port))
        return await asyncio.open_connection(sock=sock, limit=SLICE_BYTES)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        due_s = time.monotonic()
        while part := await reader.read(SLICE_BYTES):
            due_s = max(due_s, time.monotonic()) + len(part) / self.bytes_s
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            writer.write(part)
            await writer.drain()
        writer.write_eof()
