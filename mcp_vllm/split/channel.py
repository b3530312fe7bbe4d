"""One connection's messages: framing over a socket, heartbeats, and silence as an error.

Engine and stage both use it. `send` may be called from several threads; `receive` and `poll` from
one at a time.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from mcp_vllm.split import wire
from mcp_vllm.split.errors import StageLost, StageTimeout, WireError
from mcp_vllm.split.wire import HEADER, Kind

BUFFER_BYTES = 4 << 20
# Received at once: the messages of a decode step are smaller, and each call takes its time.
_AHEAD_BYTES = 32 << 10
_TLS_BYTES = 128 << 10
# After Soon: what it announces is there within two tenths of that, in a decode step.
_AWAKE_S = 1e-3
# A peer that vanished without a word is noticed after IDLE + COUNT * INTERVAL seconds.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


@dataclass(frozen=True)
class Patience:
    """How long to wait for the other side.

    Attributes:
        silence_s: without a byte for so long, it is lost; None: wait for ever.
        heartbeat_s: ask so often whether it is alive; None: never.
        total_s: for the whole message; None: no bound.
    """

    silence_s: float | None = None
    heartbeat_s: float | None = None
    total_s: float | None = None


@dataclass(frozen=True)
class Message:
    kind: Kind
    step: int
    metadata: bytearray
    payload: bytearray


class Channel:
    """Owns the socket.

    Attributes:
        max_metadata, max_payload, max_kv_payload: bytes that the next message may have, if it
            carries pages of KV the last of these.
        shares_cores: with the other side: Soon is said, and keeps a thread that receives awake;
            else it is not, and means nothing.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._lock = threading.Lock()
        self._sends_parts = not isinstance(connected, ssl.SSLSocket)
        self._readable = select.poll()
        self._readable.register(connected, select.POLLIN)
        self._buffer = memoryview(bytearray(_AHEAD_BYTES))
        self._ahead = self._buffer[:0]
        self._awake_until = 0.0
        self.shares_cores = False
        self.max_metadata = wire.MAX_HELLO_BYTES
        self.max_payload = 0
        self.max_kv_payload = 0

    def send(
        self,
        kind: Kind,
        metadata: msgspec.Struct | None = None,
        payload: Sequence[memoryview] = (),
        step: int = 0,
        patience: Patience = Patience(),
    ) -> None:
        """Raises StageLost: the connection is gone, or takes nothing for `patience.silence_s`."""
        encoded = b"" if metadata is None else msgspec.msgpack.encode(metadata)
        payload_bytes = sum(part.nbytes for part in payload)
        header = wire.pack_header(kind, len(encoded), payload_bytes, step)
        parts = [memoryview(header + encoded), *(part for part in payload if part.nbytes)]
        with self._lock:
            try:
                self._send_all(parts, patience.silence_s)
            except OSError as error:
                raise StageLost(_reason(error)) from error

    def announce(self, patience: Patience = Patience()) -> None:
        """Let the other side wake for what this one sends next, where they share cores.

        Raises StageLost, as `send` does.
        """
        if self.shares_cores:
            self.send(Kind.SOON, patience=patience)

    def receive(self, patience: Patience = Patience()) -> Message:
        """The next message that is neither Ping (answered here) nor Pong nor Soon.

        Raises:
            StageLost: the connection is gone, or silent for too long.
            WireError: what comes is not the protocol, or too large.
        """
        until = None if patience.total_s is None else time.monotonic() + patience.total_s
        while True:
            message = self._frame(self._read(HEADER.size, patience, until), patience, until)
            if message is not None:
                return message

    def poll(self, patience: Patience) -> Message | None:
        """A message that has begun to arrive, without waiting for one; raises as `receive` does."""
        while True:
            first = bytearray(1)
            try:
                count = self._fill(memoryview(first), 0)
            except (OSError, ValueError) as error:
                raise StageLost(_reason(error)) from error
            if count is None:
                return None
            if count == 0:
                raise StageLost("the connection was closed")
            header = first + self._read(HEADER.size - 1, patience, None)
            message = self._frame(header, patience, None)
            if message is not None:
                return message

    def ping(self, patience: Patience) -> float:
        """Seconds of a round trip, on a connection where nothing else is under way.

        Raises StageLost, WireError.
        """
        started = time.perf_counter()
        self.send(Kind.PING, patience=patience)
        header = wire.unpack_header(self._read(HEADER.size, patience, None), 0, 0)
        if header.kind != Kind.PONG:
            raise WireError(f"expected PONG, got {header.kind.name}")
        return time.perf_counter() - started

    def close(self) -> None:
        """End the connection; a thread that waits in `receive` gets StageLost. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _frame(self, header: bytearray, patience: Patience, until: float | None) -> Message | None:
        """What belongs to `header`; None after a heartbeat, which is answered, and after Soon."""
        bounds = self.max_metadata, self.max_payload, self.max_kv_payload
        parsed = wire.unpack_header(header, *bounds)
        metadata = self._read(parsed.metadata_bytes, patience, until)
        payload = self._read(parsed.payload_bytes, patience, until)
        if parsed.kind == Kind.PING:
            self.send(Kind.PONG, patience=patience)
        awake_s = _AWAKE_S if self.shares_cores and parsed.kind == Kind.SOON else 0.0
        self._awake_until = time.monotonic() + awake_s
        if parsed.kind in (Kind.PING, Kind.PONG, Kind.SOON):
            return None
        return Message(parsed.kind, parsed.step, metadata, payload)

    def _send_all(self, parts: list[memoryview], silence_s: float | None) -> None:
        if self._socket.gettimeout() != silence_s:
            self._socket.settimeout(silence_s)
        if not self._sends_parts:
            # A deadline is for one call, however much it has to send.
            for part in parts:
                octets = part.cast("B")
                for start in range(0, len(octets), _TLS_BYTES):
                    self._socket.sendall(octets[start : start + _TLS_BYTES])
            return
        while parts:
            sent = self._socket.sendmsg(parts)
            while parts and sent >= parts[0].nbytes:
                sent -= parts.pop(0).nbytes
            if sent:
                parts[0] = parts[0].cast("B")[sent:]

    def _read(self, size: int, patience: Patience, until: float | None) -> bytearray:
        """Exactly `size` bytes."""
        buffer = bytearray(size)
        view = memoryview(buffer)
        last_byte = last_ping = time.monotonic()
        while view:
            try:
                count = self._fill(view, _shortest(patience))
            except (OSError, ValueError) as error:  # ValueError: closed by another thread
                raise StageLost(_reason(error)) from error
            now = time.monotonic()
            if count == 0:
                raise StageLost("the connection was closed")
            if until is not None and now > until:
                raise StageTimeout(f"no answer within {patience.total_s:g} s")
            if count is not None:
                view, last_byte = view[count:], now
            elif patience.silence_s is not None and now - last_byte >= patience.silence_s:
                raise StageLost(f"silent for {now - last_byte:.2f} s")
            elif patience.heartbeat_s is not None and now - last_ping >= patience.heartbeat_s:
                self.send(Kind.PING, patience=patience)
                last_ping = now
        return buffer

    def _fill(self, view: memoryview, timeout_s: float | None) -> int | None:
        """Bytes put into `view`, 0 at the end of the connection; None: none in time.

        What is received beyond them waits for the next call.
        """
        if not self._ahead:
            if view.nbytes >= _AHEAD_BYTES:
                return self._receive_some(view, timeout_s)
            count = self._receive_some(self._buffer, timeout_s)
            if not count:
                return count
            self._ahead = self._buffer[:count]
        count = min(view.nbytes, self._ahead.nbytes)
        view[:count] = self._ahead[:count]
        self._ahead = self._ahead[count:]
        return count

    def _receive_some(self, view: memoryview, timeout_s: float | None) -> int | None:
        """Bytes received into `view`, 0 at the end of the connection; None: none in time.

        Waits by itself: the socket's timeout is that of `send`, which another thread may be in.
        """
        if self._socket.fileno() < 0:
            raise ValueError("the connection was closed")
        if self._sends_parts:
            return self._socket.recv_into(view) if self._comes(timeout_s) else None
        # OpenSSL's connections are not for two threads at once: wait outside the lock, read inside.
        assert isinstance(self._socket, ssl.SSLSocket)
        if not self._socket.pending() and not self._comes(timeout_s):
            return None
        with self._lock:
            self._socket.settimeout(0)
            try:
                return self._socket.recv_into(view)
            except (ssl.SSLWantReadError, BlockingIOError):
                return None

    def _comes(self, timeout_s: float | None) -> bool:
        """Whether something does in time. What was said to come soon is waited for awake: to be
        woken takes a thread as long as the other side takes for it."""
        while timeout_s != 0 and time.monotonic() < self._awake_until:
            if self._readable.poll(0):
                return True
        return bool(self._readable.poll(None if timeout_s is None else timeout_s * 1000))


def connect(
    host: str, port: int, timeout_s: float, tls: ssl.SSLContext | None = None
) -> socket.socket:
    """Raises StageLost."""
    try:
        plain = socket.create_connection((host, port), timeout_s)
        tune(plain)
        return tls.wrap_socket(plain, server_hostname=host) if tls is not None else plain
    except OSError as error:
        raise StageLost(_reason(error)) from error


def tune(connected: socket.socket) -> None:
    """Set what both sides want of a TCP connection."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connected.setsockopt(socket.SOL_SOCKET, buffer, BUFFER_BYTES)


def expect(message: Message, kind: Kind, step: int = 0) -> Message:
    """`message`, which is of this kind and step. Raises WireError."""
    if message.kind != kind or message.step != step:
        raise WireError(
            f"expected {kind.name} of step {step}, got {message.kind.name} of step {message.step}"
        )
    return message


def _shortest(patience: Patience) -> float | None:
    bounds = (patience.heartbeat_s, patience.silence_s, patience.total_s)
    return min((each for each in bounds if each is not None), default=None)


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "strerror", None) or str(error)
