"""The engine's end of the link: one thread that owns the socket, the jobs and the deadlines.

Called from the scheduler thread, which must never wait: every method only appends to a queue, and
`poll` only takes from one. All other state belongs to the link's thread. Chunks that landed are
copied into the host chunks by that thread too, so a job that was given up is never written late.

The link connects by itself, again and again; while it has no agent, jobs fail at once and lookups
are not answered, which the tier turns into misses.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mcp_vllm.errors import McpError
from mcp_vllm.link import protocol
from mcp_vllm.link.events import Event, Found, JobDone, Lost
from mcp_vllm.link.jobs import JobTable
from mcp_vllm.link.protocol import LENGTH, LinkError, group_index
from mcp_vllm.link.shared_memory import (
    Bytes2D,
    MappedRows,
    check_same_user,
    map_rows,
    receive_with_fd,
    send_with_fd,
)
from mcp_vllm.link.spans import scatter

logger = logging.getLogger(__name__)

MAX_OUTGOING_BYTES = 64 << 20
RECEIVE_BYTES = 1 << 20


@dataclass(frozen=True)
class LinkDeadlines:
    """How long the link waits for what, in seconds.

    Attributes:
        load_grace_s: the agent keeps its own deadline for a load; this much later we give up, which
            only matters when the agent hangs.
        reconnect_max_s: attempts become rarer up to this; a connection that lasted longer counts
            as a good one, after which they start anew.
    """

    handshake_s: float = 5.0
    store_s: float = 10.0
    load_grace_s: float = 1.0
    reconnect_min_s: float = 0.05
    reconnect_max_s: float = 2.0


class AgentStarting(McpError):
    """The agent was started and is not ready yet: worth another try soon, not worth a warning."""


@dataclass
class LinkCounters:
    """Totals since the start; written by the link's thread, read by anyone."""

    connects: int = 0
    disconnects: int = 0


class AgentLink:
    """See the module's docstring.

    Args:
        socket_path: where the agent listens.
        make_hello: builds our introduction, called in the link's thread before each connect; may
            take long (it may hash weights) and may raise McpError, which keeps us disconnected.
        host_fd: read-only descriptor of the host chunks, owned by the caller.
        host_rows: uint8, shape (num_chunks, chunk_bytes), writable view of the host chunks.
        before_connect: called in the link's thread before each attempt; starts the agent where
            that is ours to do, and raises AgentStarting until it is ready.
        deadlines: how long to wait for what.
    """

    def __init__(
        self,
        socket_path: str,
        make_hello: Callable[[], protocol.Hello],
        host_fd: int,
        host_rows: Bytes2D,
        before_connect: Callable[[], None] = lambda: None,
        deadlines: LinkDeadlines = LinkDeadlines(),
    ) -> None:
        self._socket_path = socket_path
        self._make_hello = make_hello
        self._host_fd = host_fd
        self._host_rows = host_rows
        self._before_connect = before_connect
        self._deadlines = deadlines
        self.counters = LinkCounters()
        self.lookup_s = 0.05
        self.asks_peers = True
        self.wants_positions = False
        self.shared_tenants: Sequence[str] = ()
        self._load_s = 10.0
        self._commands: deque[protocol.EngineMessage | tuple[protocol.Load, Sequence[int]]] = (
            deque()
        )
        self._events: deque[Event] = deque()
        self._connected = threading.Event()
        self._has_events = threading.Event()
        self._stopping = False
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="mcp-agent-link", daemon=True)
        # Owned by the thread:
        self._sock: socket.socket | None = None
        self._landing: MappedRows | None = None
        self._groups: list[protocol.GroupLayout] = []
        self._jobs = JobTable(self._emit)
        self._incoming = bytearray()
        self._outgoing = bytearray()

    # ---- scheduler thread -------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    def wait_connected(self, timeout_s: float) -> bool:
        """Block until the link is up, at most that long; for start-up only."""
        return self._connected.wait(timeout_s)

    def send(self, message: protocol.EngineMessage) -> None:
        """Queue a message; a Store that cannot be sent ends as a failed job."""
        self._commands.append(message)
        self._wake()

    def load(self, load: protocol.Load, chunk_ids: Sequence[int]) -> None:
        """Queue a load of `load.keys` into those host chunks, which stay ours until JobDone."""
        self._commands.append((load, chunk_ids))
        self._wake()

    def poll(self) -> list[Event]:
        """What has happened since the last call."""
        self._has_events.clear()
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def wait_event(self, timeout_s: float) -> None:
        """Block until an answer has come, or the link is lost, at most that long."""
        self._has_events.wait(timeout_s)

    def stop(self) -> None:
        """End the thread and the connection; unfinished jobs fail. Idempotent."""
        if not self._stopping:
            self._stopping = True
            os.eventfd_write(self._wake_fd, 1)
            if self._thread.is_alive():
                self._thread.join()
            os.close(self._wake_fd)
            self._host_rows = np.empty((0, 0), dtype=np.uint8)
        self._fail_commands()

    def _wake(self) -> None:
        if self._stopping:  # by our own caller: the thread has ended
            self._fail_commands()
            return
        with contextlib.suppress(BlockingIOError):  # full of wake-ups already
            os.eventfd_write(self._wake_fd, 1)

    # ---- link thread ------------------------------------------------------------------------

    def _run(self) -> None:
        delay_s = self._deadlines.reconnect_min_s
        warned = False
        while not self._stopping:
            connected_s = None
            try:
                self._before_connect()
                self._connect()
                connected_s = time.monotonic()
                self._serve()
            except AgentStarting:
                delay_s = self._deadlines.reconnect_min_s
            except Exception as error:
                if self._lasted(connected_s):
                    delay_s, warned = self._deadlines.reconnect_min_s, False
                if not warned:
                    self._warn(error)
                    warned = True
            finally:
                self._disconnect()
            self._idle(delay_s)
            delay_s = min(2 * delay_s, self._deadlines.reconnect_max_s)
        self._fail_commands()

    def _lasted(self, connected_s: float | None) -> bool:
        """Whether a connection made then was more than another failed attempt."""
        if connected_s is None:
            return False
        return time.monotonic() - connected_s > self._deadlines.reconnect_max_s

    def _warn(self, error: Exception) -> None:
        expected = isinstance(error, OSError | McpError)
        logger.warning(
            "no context agent at %s (%s): serving without it, trying again",
            self._socket_path,
            error if expected else repr(error),
            exc_info=None if expected else error,
        )

    def _idle(self, seconds: float) -> None:
        """Disconnected: fail what is asked of us until it is time to connect again."""
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_fd, selectors.EVENT_READ)
            while not self._stopping and (left := until - time.monotonic()) > 0:
                if selector.select(left):
                    self._drain_wake()
                self._fail_commands()

    def _connect(self) -> None:
        hello = self._make_hello()
        self._fail_commands()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            until_s = time.monotonic() + self._deadlines.handshake_s
            sock.settimeout(self._deadlines.handshake_s)
            sock.connect(self._socket_path)
            check_same_user(sock)
            send_with_fd(sock, protocol.pack(hello), self._host_fd)
            self._await_answer(sock, until_s)
            body, fd = receive_with_fd(sock, max(0.001, until_s - time.monotonic()))
            try:
                welcome = _welcome(body)
                if fd is None:
                    raise LinkError("the agent's welcome came without its landing slots")
                if welcome.slot_bytes < max(group.raw_bytes for group in hello.groups):
                    raise LinkError(f"landing slots of {welcome.slot_bytes} bytes hold no chunk")
                self._landing = map_rows(fd, welcome.num_slots, welcome.slot_bytes, writable=False)
            finally:
                if fd is not None:
                    os.close(fd)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        self._sock = sock
        self._groups = hello.groups
        self.lookup_s = welcome.lookup_ms / 1000
        self.asks_peers = welcome.asks_peers
        self.wants_positions = welcome.wants_positions
        self.shared_tenants = welcome.shared_tenants
        self._load_s = welcome.load_ms / 1000
        self.counters.connects += 1
        self._connected.set()
        logger.info("connected to context agent %s at %s", welcome.agent_id, self._socket_path)

    def _await_answer(self, sock: socket.socket, until_s: float) -> None:
        """Return once there is something to read; meanwhile fail what is asked of us.

        Raises:
            LinkError: no answer until then, or the link is being stopped.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_fd, selectors.EVENT_READ)
            selector.register(sock, selectors.EVENT_READ)
            while not self._stopping:
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    raise LinkError("it accepted the connection and did not answer")
                ready = {key.fd for key, _ in selector.select(left_s)}
                if self._wake_fd in ready:
                    self._drain_wake()
                    self._fail_commands()
                if sock.fileno() in ready:
                    return
        raise LinkError("the link is being stopped")

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._connected.clear()
            self.counters.disconnects += 1
            self._sock.close()
            self._sock = None
            self._emit(Lost())
        self._jobs.fail_all("agent")
        if self._landing is not None:
            self._landing.close()
            self._landing = None
        self._incoming.clear()
        self._outgoing.clear()

    def _serve(self) -> None:
        assert self._sock is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_fd, selectors.EVENT_READ)
            selector.register(self._sock, selectors.EVENT_READ)
            while not self._stopping:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
                selector.modify(self._sock, events)
                ready = {key.fd for key, _ in selector.select(self._jobs.next_deadline_s())}
                if self._wake_fd in ready:
                    self._drain_wake()
                self._take_commands()
                self._flush()
                if self._sock.fileno() in ready:
                    self._receive()
                self._jobs.expire()

    def _take_commands(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, tuple):
                load, chunk_ids = command
                self._jobs.add_load(load, chunk_ids, self._load_s + self._deadlines.load_grace_s)
                self._outgoing += protocol.pack(load)
                continue
            if isinstance(command, protocol.Store):
                self._jobs.add_store(command, self._deadlines.store_s)
            self._outgoing += protocol.pack(command)
        if len(self._outgoing) > MAX_OUTGOING_BYTES:
            raise LinkError("the agent does not read its messages")

    def _flush(self) -> None:
        assert self._sock is not None
        if not self._outgoing:
            return
        try:
            sent = self._sock.send(self._outgoing)
        except BlockingIOError:
            return
        del self._outgoing[:sent]

    def _receive(self) -> None:
        assert self._sock is not None
        try:
            received = self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        if not received:
            raise LinkError("the agent closed the connection")
        self._incoming += received
        while len(self._incoming) >= LENGTH.size:
            size = protocol.body_size(self._incoming[: LENGTH.size])
            end = LENGTH.size + size
            if len(self._incoming) < end:
                break
            body = bytes(self._incoming[LENGTH.size : end])
            del self._incoming[:end]
            self._handle(protocol.unpack_agent(body))

    def _handle(self, message: protocol.AgentMessage) -> None:
        match message:
            case protocol.Found():
                self._emit(Found(message.lookup_id, message.present))
            case protocol.Inventory():
                self._events.append(message)  # nobody waits for it
            case protocol.Landed():
                self._copy_landed(message)
            case protocol.Loaded():
                self._finish_load(message)
            case protocol.Stored():
                self._finish_store(message)
            case _:
                raise LinkError(f"unexpected {type(message).__name__} from the agent")

    def _copy_landed(self, message: protocol.Landed) -> None:
        assert self._landing is not None
        job = self._jobs.get(message.job_id)
        for index, slot in message.slots:
            if not 0 <= slot < len(self._landing.rows):
                raise LinkError(f"the agent named landing slot {slot}, which does not exist")
            if job is None or index not in job.missing:
                continue  # given up meanwhile: the host chunk may be somebody else's by now
            group = self._groups[group_index(job.keys[index])]
            scatter(self._landing.rows[slot], group.spans, self._host_rows[job.chunk_ids[index]])
            job.missing.discard(index)
        self._outgoing += protocol.pack(protocol.Release([slot for _, slot in message.slots]))

    def _finish_load(self, message: protocol.Loaded) -> None:
        job = self._jobs.end(message.job_id, is_load=True)
        if job is None:
            return
        done = JobDone(
            message.job_id,
            frozenset(job.missing),
            message.raw_bytes,
            message.wire_bytes,
            tuple(message.sources),
            tuple(message.causes),
            tuple((i, loss) for i, loss in message.losses if 0 <= i < len(job.keys)),
        )
        self._emit(done)

    def _finish_store(self, message: protocol.Stored) -> None:
        if self._jobs.end(message.job_id, is_load=False) is None:
            self._outgoing += protocol.pack(protocol.Discard(message.job_id))
            return
        self._outgoing += protocol.pack(protocol.Commit(message.job_id))
        done = JobDone(message.job_id, frozenset(), raw_bytes=message.num_bytes)
        self._emit(done)

    def _emit(self, event: Event) -> None:
        self._events.append(event)
        self._has_events.set()

    def _fail_commands(self) -> None:
        """No agent: every job that was asked for has failed, everything else is void."""
        while self._commands:
            command = self._commands.popleft()
            message = command[0] if isinstance(command, tuple) else command
            if isinstance(message, protocol.Load | protocol.Store):
                failed = frozenset(range(len(message.keys)))
                self._emit(JobDone(message.job_id, failed, causes=("no agent",)))

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)


def _welcome(body: bytes) -> protocol.Welcome:
    """The agent's answer to our Hello. Raises LinkError unless it accepts."""
    answer = protocol.unpack_agent(body)
    if isinstance(answer, protocol.Refused):
        raise LinkError(f"refused by the agent: {answer.reason}")
    if not isinstance(answer, protocol.Welcome):
        raise LinkError("the agent answered without a welcome")
    return answer
