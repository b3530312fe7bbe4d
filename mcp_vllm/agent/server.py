"""The agent process: listens for engines on a Unix socket and for peers over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
from concurrent.futures import Future
from pathlib import Path

from aiohttp import web

from mcp_vllm.agent.access import Access
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.discovery import Discovery
from mcp_vllm.agent.disk import JOURNAL_SHARE, KeptSessions
from mcp_vllm.agent.encoder import Encoder
from mcp_vllm.agent.engine_port import EnginePort, accept_engine
from mcp_vllm.agent.http_api import HttpApi
from mcp_vllm.agent.listener import Listener
from mcp_vllm.agent.parking import ParkingFolder
from mcp_vllm.agent.peer_http import Member
from mcp_vllm.agent.peers import Peers
from mcp_vllm.agent.quotas import QuotaReports
from mcp_vllm.agent.replicator import Replicator
from mcp_vllm.agent.security import AgentSecurity
from mcp_vllm.agent.sessions import Sessions
from mcp_vllm.config import Address, AgentConfig, Config
from mcp_vllm.errors import McpError
from mcp_vllm.link.supervisor import READY_LINE
from mcp_vllm.session.manifest import SessionKey
from mcp_vllm.store.smart_cache import load_kernels

logger = logging.getLogger(__name__)

DEFAULT_LISTEN = AgentConfig().listen
# Peers in the middle of a transfer may finish it for so long; the engine's host waits 3 s for us.
SHUTDOWN_GRACE_S = 1.0
ACCEPT_PAUSE_S = 0.2
# Longer than peers keep idle connections, so that they are not cut off when they use one again.
KEEPALIVE_S = 75.0
# For the body of a request that was refused before it was read.
LINGER_S = 2.0


class AgentError(McpError):
    """The agent cannot run as configured."""


class Agent:
    """One context agent.

    Args:
        config: the whole configuration.
        socket_path: where engines connect; created with access for this user only.
        owned: started by an engine host: end when standard input ends, and fall back to any free
            port when the default one is taken.

    Attributes:
        port: where peers reach it, once it listens.
    """

    def __init__(self, config: Config, socket_path: Path, owned: bool) -> None:
        self._config = config
        self._socket_path = socket_path
        self._owned = owned
        self.port: int | None = None
        self._context = AgentContext(config)
        self._encoder = Encoder(self._context)
        self._engines: set[asyncio.Task[None]] = set()

    @property
    def codecs_loaded(self) -> Future[None]:
        """Done when all is loaded that an agent loads beside its start."""
        return self._context.codecs.loaded

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or, when owned, the end of standard input.

        Raises:
            AgentError: the socket or the address cannot be used.
            SecurityError: a certificate, key or token file cannot be used.
            RedisSetupError: the registry of peers cannot be used.
        """
        # Codec threads give way to the event loop sooner than after 5 ms: a lookup has 40.
        sys.setswitchinterval(0.0005)
        load_kernels()  # from the installation's cache: nothing that is served waits for it
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, stop.set)
        if self._owned:
            loop.add_reader(sys.stdin.fileno(), lambda: self._stdin_ready(stop))
        agent = self._config.agent
        self._security = security = AgentSecurity(self._config.security)
        listener = self._listen_for_engines()
        self._peers = Peers(self._context, security)
        self._context.seals = security.seals
        kept = self._start_disk()
        if self._context.tiers.shared is not None:
            self._context.tiers.shared.start()
        quotas = QuotaReports(
            self._config.tenants,
            self._context.store,
            self._context.sessions,
            self._context.metrics,
            security.audit,
        )
        http = HttpApi(
            self._context,
            self._encoder,
            self._peers,
            self._sessions(kept),
            quotas,
            is_guarded=security.is_required,
        )
        access = Access(security)
        self._listener = Listener(security.server_context, access.refuse_tls)
        self.application = http.application([self._listener.middleware, access.middleware])
        runner = web.AppRunner(
            self.application,
            access_log=None,
            shutdown_timeout=SHUTDOWN_GRACE_S,
            keepalive_timeout=KEEPALIVE_S,
            lingering_time=LINGER_S,
        )
        background: list[asyncio.Task[None]] = []
        try:
            await runner.setup()
            port = await self._listen_for_peers()
            assert runner.server is not None
            self._listener.start(runner.server)
            self.port = port
            discovery = self._discovery(port)
            self._peers.set_members("peers", map(Member, self._config.peers))
            logger.info(
                "context agent %s: engines at %s, peers at port %d, %d MiB for chunks",
                self._context.agent_id,
                self._socket_path,
                port,
                agent.ram_bytes >> 20,
            )
            sys.stdout.buffer.write(READY_LINE)
            sys.stdout.flush()
            background += [
                asyncio.create_task(self._accept(listener)),
                asyncio.create_task(self._encoder.run()),
                asyncio.create_task(security.watch()),
                asyncio.create_task(discovery.run()),
                asyncio.create_task(Replicator(self._context, self._peers).run()),
            ]
            await stop.wait()
        finally:
            await _cancel(background + list(self._engines))
            listener.close()
            self._socket_path.unlink(missing_ok=True)
            await self._listener.close()
            await runner.cleanup()
            await self._peers.close()
            quotas.close()
            if kept is not None:
                await kept.close()
            if self._context.tiers.disk is not None:
                self._context.store.policy.keep()
            for tier in (self._context.tiers.shared, self._context.tiers.disk):
                if tier is not None:
                    await tier.close()
            security.close()
            self._context.close()

    def _discovery(self, port: int) -> Discovery:
        context = self._context
        return Discovery(self._config, context.agent_id, port, self._peers, context.metrics)

    def _start_disk(self) -> KeptSessions | None:
        """The sessions and blocks of an agent that was here before are ours from now on."""
        disk, config = self._context.tiers.disk, self._config.agent.disk
        if disk is None or config.path is None:
            return None
        kept = KeptSessions(config.path, config.bytes // JOURNAL_SHARE, self._context.sessions)
        kept.restore()
        disk.start()
        size = disk.size()
        logger.info("%s: %d chunks in %d MiB", config.path, size.num_chunks, size.file_bytes >> 20)
        return kept

    def _sessions(self, kept: KeptSessions | None) -> Sessions:
        agent, tenants = self._config.agent, self._config.tenants
        folder, parking = agent.parking_folder, None
        if folder is not None:
            parking = ParkingFolder(folder, int(agent.parking_bytes), tenants.parked_bytes_of)
        if parking is not None:
            for manifest in sorted(parking.manifests(), key=lambda each: each.last_used_s):
                if not self._is_whole(manifest.key):
                    self._context.sessions.put(manifest)
        return Sessions(self._context, self._encoder, self._peers, parking, kept)

    def _is_whole(self, key: SessionKey) -> bool:
        """Whether a session that was woken came back with all of its chunks: its parked file is
        the older one then."""
        manifest, tiers = self._context.sessions.get(key), self._context.tiers
        return manifest is not None and all(
            name in tiers for name in self._context.names_of(manifest)
        )

    def _stdin_ready(self, stop: asyncio.Event) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            stop.set()

    def _listen_for_engines(self) -> socket.socket:
        path = self._socket_path
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_stale_socket(path)
            previous = os.umask(0o177)
            try:
                listener.bind(str(path))
            finally:
                os.umask(previous)
        except OSError as error:
            listener.close()
            raise AgentError(f"agent.socket: cannot listen at {path}: {error}") from error
        except AgentError:
            listener.close()
            raise
        listener.listen(64)
        listener.setblocking(False)
        return listener

    async def _listen_for_peers(self) -> int:
        address = Address.parse(self._config.agent.listen)
        host, port = address.host, address.port
        may_move = self._owned and self._config.agent.listen == DEFAULT_LISTEN
        try:
            return await self._listener.bind(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not may_move:
                raise AgentError(
                    f"agent.listen: cannot listen at {host}:{port}: {error}"
                ) from error
        moved = await self._listener.bind(host, 0)
        logger.warning(
            "port %d is taken; peers reach this agent at %s:%d (set agent.listen to choose)",
            port,
            host,
            moved,
        )
        return moved

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                logger.error("an engine could not connect: %s", error)
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            task = asyncio.create_task(self._serve_engine(sock))
            self._engines.add(task)
            task.add_done_callback(self._engines.discard)

    async def _serve_engine(self, sock: socket.socket) -> None:
        try:
            port: EnginePort = await asyncio.to_thread(accept_engine, sock, self._context)
        except (McpError, OSError) as error:
            logger.warning("a connection to the engine socket was refused: %s", error)
            sock.close()
            return
        await port.serve(sock, self._context, self._peers, self._encoder)


def _remove_stale_socket(path: Path) -> None:
    """Make room for our socket. Raises AgentError when something else is there."""
    if not path.exists():
        return
    if not path.is_socket():
        raise AgentError(f"agent.socket: {path} exists and is no socket: choose another path")
    if _is_served(path):
        raise AgentError(f"agent.socket: another agent serves {path} already")
    path.unlink(missing_ok=True)


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)
