"""A real Redis (or Valkey) server on a port of its own, for tests; skipped where there is none."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import wait_for

BINARY = next(filter(None, map(shutil.which, ("redis-server", "valkey-server"))), None)

needs_redis = pytest.mark.skipif(
    BINARY is None, reason="no redis-server and no valkey-server on the path"
)


class RedisServer:
    """May be killed and started again at the same port; keeps nothing."""

    def __init__(self, folder: Path, port: int, password: str = "") -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"
        self._folder = folder
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert BINARY is not None
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        arguments += ["--save", "", "--appendonly", "no"]
        if self._password:
            arguments += ["--requirepass", self._password]
        self._process = subprocess.Popen([BINARY, *arguments], stdout=subprocess.DEVNULL)
        wait_for("the server to listen", self._listens)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """It accepts, and answers nothing, until the end."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


@contextlib.contextmanager
def running_redis(folder: Path, password: str = "") -> Iterator[RedisServer]:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    server = RedisServer(folder, port, password)
    try:
        server.start()
        yield server
    finally:
        server.kill()
