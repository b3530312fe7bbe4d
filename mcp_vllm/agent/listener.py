"""Accepts the connections of peers and operators, and keeps slow or idle ones from exhausting us.

aiohttp's own sites neither count connections nor bound the time until a request's head is
complete, or that of a TLS handshake, together; here every accepted socket counts from the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from mcp_vllm.agent.access import Handler

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 512
# From the accepted socket to the complete head of the first request, a TLS handshake included.
HEAD_S = 10.0
SWEEP_S = 0.5
ACCEPT_PAUSE_S = 0.2
# What was closed is said again after so long, not for each connection.
LOG_AGAIN_S = 60.0
BACKLOG = 128


class _Connection:
    """One accepted socket. It is busy while a handler works for it."""

    def __init__(self, now_s: float) -> None:
        self.accepted_s = now_s
        self.num_requests = 0
        self.busy = False
        self.transport: asyncio.Transport | None = None
        self.opening: asyncio.Task[None] | None = None

    @property
    def is_closed(self) -> bool:
        opened = self.opening is not None and self.opening.done()
        return opened and (self.transport is None or self.transport.is_closing())

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        elif self.opening is not None:
            self.opening.cancel()


class Listener:
    """The agent's listening sockets and what was accepted on them.

    Args:
        tls: the context for the next connection, None for plain HTTP.
        refused: told of each failed handshake: the address, and why.
    """

    def __init__(
        self, tls: Callable[[], ssl.SSLContext | None], refused: Callable[[str, str], None]
    ) -> None:
        self._tls = tls
        self._refused = refused
        # Those that have been without a request for longest come first.
        self._connections: dict[RequestHandler, _Connection] = {}
        self._sockets: list[socket.socket] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._said_s: dict[str, float] = {}

    def __len__(self) -> int:
        """Connections that are open."""
        return sum(not each.is_closed for each in self._connections.values())

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Tells when a connection is busy."""
        connection = self._connections.get(request.protocol)
        if connection is None:
            return await handler(request)
        connection.num_requests += 1
        connection.busy = True
        try:
            return await handler(request)
        finally:
            connection.busy = False
            if self._connections.pop(request.protocol, None) is not None:
                self._connections[request.protocol] = connection

    async def bind(self, host: str, port: int) -> int:
        """Take the address (all that a name stands for); returns the port. Raises OSError."""
        self._sockets = await _bound(host, port)
        return int(self._sockets[0].getsockname()[1])

    def start(self, server: web.Server) -> None:
        """Serve `server` at what `bind` took."""
        for each in self._sockets:
            self._tasks.append(asyncio.create_task(self._accept(each, server)))
        self._tasks.append(asyncio.create_task(self._sweep()))

    async def close(self) -> None:
        """Accept nothing more; open connections stay, unfinished handshakes do not."""
        opening = [each.opening for each in self._connections.values() if each.opening]
        for task in [*self._tasks, *opening]:
            task.cancel()
        await asyncio.gather(*self._tasks, *opening, return_exceptions=True)
        for each in self._sockets:
            each.close()

    async def _accept(self, listening: socket.socket, server: web.Server) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listening)
            except OSError as error:
                logger.error("a peer could not connect: %s", error)
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if self._make_room():
                self._open(sock, str(address[0]), server)
            else:
                sock.close()
            # An accept that finds a connection waiting does not yield: a flood of them would keep
            # the loop from everything else, from closing what made room too.
            await asyncio.sleep(0)

    def _make_room(self) -> bool:
        """Whether one more fits, if need be in place of the one that was idle for longest."""
        if len(self._connections) < MAX_CONNECTIONS:
            return True
        self._say(f"{MAX_CONNECTIONS} connections are open: idle ones are closed for new ones")
        for protocol, connection in self._connections.items():
            if not connection.busy:
                connection.abort()
                del self._connections[protocol]
                return True
        return False

    def _open(self, sock: socket.socket, address: str, server: web.Server) -> None:
        protocol = server()
        connection = _Connection(asyncio.get_running_loop().time())
        self._connections[protocol] = connection
        connection.opening = asyncio.create_task(
            self._handshake(sock, address, protocol, connection)
        )

    async def _handshake(
        self,
        sock: socket.socket,
        address: str,
        protocol: RequestHandler,
        connection: _Connection,
    ) -> None:
        loop = asyncio.get_running_loop()
        context = self._tls()
        timeout_s = None if context is None else HEAD_S
        try:
            sock.setblocking(False)
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, sock, ssl=context, ssl_handshake_timeout=timeout_s
            )
            connection.transport = transport
        except ssl.SSLError as error:
            self._refused(address, f"TLS: {error.reason}")
        except (OSError, asyncio.CancelledError):
            # The other side is gone, silent for too long, or made room for another. (A task that
            # kept this error would hold itself, and 300 KB of buffers, until a full collection.)
            pass
        finally:
            if connection.transport is None:
                sock.close()
                self._connections.pop(protocol, None)

    async def _sweep(self) -> None:
        """Forget what is closed; close what has not brought a request in time."""
        while True:
            await asyncio.sleep(SWEEP_S)
            since_s = asyncio.get_running_loop().time() - HEAD_S
            for protocol, connection in list(self._connections.items()):
                if connection.is_closed:
                    del self._connections[protocol]
                elif not connection.num_requests and connection.accepted_s < since_s:
                    connection.abort()
                    self._say(f"a connection without a whole request in {HEAD_S:g} s was closed")

    def _say(self, what: str) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._said_s.get(what, -LOG_AGAIN_S) >= LOG_AGAIN_S:
            self._said_s[what] = now_s
            logger.warning("%s", what)


async def _bound(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of `host`. Raises OSError when there is none, or one is taken."""
    infos = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        last: OSError | None = None
        for family, kind, protocol, _, address in dict.fromkeys(infos):
            try:
                sock = _listening(family, kind, protocol, address)
            except OSError as error:
                # A name may stand for an address of a family that this host does not have.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                last = error
            else:
                sockets.append(stack.enter_context(sock))
        if not sockets:
            raise last or OSError(errno.EADDRNOTAVAIL, "no address")
        stack.pop_all()
    return sockets


def _listening(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
