"""A TCP proxy that is a slow, far link: a delay each way, and a bandwidth for each direction."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time

_CHUNK_BYTES = 16 << 10


class ShapedLink:
    """Forwards every connection to `target` (host, port); used as a context manager.

    Attributes:
        delay_s: one way. bytes_s: each way; None: as quick as it goes. Both may be changed at any
            time; what is on its way keeps the old ones.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self.delay_s = 0.0
        self.bytes_s: float | None = None

    def __enter__(self) -> ShapedLink:
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(self._target)
                for pair in ((here, there), (there, here)):
                    for each in pair:
                        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    due: queue.Queue[tuple[float, bytes]] = queue.Queue()
                    threading.Thread(target=self._read, args=(pair[0], due), daemon=True).start()
                    threading.Thread(target=self._write, args=(pair[1], due), daemon=True).start()

    def _read(self, source: socket.socket, due: queue.Queue[tuple[float, bytes]]) -> None:
        """Everything that comes, with the time at which it has crossed the link."""
        sent = 0.0
        with contextlib.suppress(OSError):
            while chunk := source.recv(_CHUNK_BYTES):
                sent = max(sent, time.perf_counter())
                if self.bytes_s is not None:
                    sent += len(chunk) / self.bytes_s
                due.put((sent + self.delay_s, chunk))
        due.put((0.0, b""))

    def _write(self, sink: socket.socket, due: queue.Queue[tuple[float, bytes]]) -> None:
        with contextlib.suppress(OSError):
            while True:
                at, chunk = due.get()
                if not chunk:
                    sink.shutdown(socket.SHUT_WR)
                    return
                if (wait_s := at - time.perf_counter()) > 0:
                    time.sleep(wait_s)
                sink.sendall(chunk)
