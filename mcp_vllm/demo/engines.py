"""Real servers as child processes: `vllm serve` engines and context agents, for the demo, the
benchmarks and the integration tests.

A server runs in a session of its own under a small supervisor (`supervise.py`): a terminal's Ctrl-C
reaches only the owner, which then stops its servers in order, and nothing is left behind when the
owner is killed. Use as a context manager, or call `stop()`.
"""

import contextlib
import http.client
import importlib.metadata
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from mcp_vllm.demo import supervise
from mcp_vllm.errors import McpError

HOST = "127.0.0.1"

_CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
_PORTS = range(20_000, 32_000)
_LOG_LINES = 30
_POLL_INTERVAL_S = 0.25
_PROBE_TIMEOUT_S = 5.0
_GRACE_S = 15.0
_SUPERVISOR_SLACK_S = 10.0


class EngineFailed(McpError):
    """A server did not start, or ended by itself; the message ends with its last log lines."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at this moment.

    It lies below the range that systems take outgoing connections' ports from: a server may need a
    minute to bind it.
    """
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise EngineFailed(f"no free port from {_PORTS.start} to {_PORTS.stop}")


def is_cpu_build() -> bool:
    """Is the installed vLLM its CPU build? Told from package metadata, without importing vLLM."""
    for distribution in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return distribution == "vllm-cpu" or "cpu" in version or sys.platform == "darwin"
    return False


def default_environment() -> dict[str, str]:
    """Settings that suit a small CPU machine; empty where vLLM is built for an accelerator."""
    return dict(_CPU_ENVIRONMENT) if is_cpu_build() else {}


def quick_dtype_args(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """`--dtype float32` where bfloat16 would be converted before each product: vLLM's CPU build on
    an x86 processor without AVX-512, where a prefill in bfloat16 takes seven times as long."""
    # Not from llvmlite, as the codecs ask: loaded first, it breaks vLLM's CPU worker.
    try:
        flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return ()
    return ("--dtype", "float32") if is_cpu_build() and "avx512bw" not in flags.split() else ()


class Server:
    """One HTTP server process, from its start to the end of its last descendant.

    Owned by the thread that started it; not for use from several threads.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        health_path: str = "/health",
        grace_s: float = _GRACE_S,
    ) -> None:
        """Start `command`, with `env` laid over our environment and output to `log_path`."""
        self.name = name
        self.port = port
        self.log_path = log_path
        self._health_path = health_path
        self._grace_s = grace_s
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("wb") as log:
            self._supervisor = subprocess.Popen(
                [sys.executable, supervise.__file__, str(grace_s), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(env or {}),
                start_new_session=True,
            )

    @property
    def base_url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """The supervisor's process id; the server and its workers are its descendants."""
        return self._supervisor.pid

    def is_running(self) -> bool:
        return self._supervisor.poll() is None

    def wait_ready(self, deadline_s: float) -> float:
        """Wait until the health check answers 200; returns the seconds waited.

        Raises EngineFailed when the process ends first or `deadline_s` passes.
        """
        start = time.monotonic()
        while (waited_s := time.monotonic() - start) < deadline_s:
            if not self.is_running():
                raise self._failure(f"ended with exit status {self._supervisor.returncode}")
            if self._is_healthy():
                return waited_s
            time.sleep(_POLL_INTERVAL_S)
        raise self._failure(f"was not ready within {deadline_s:g} s")

    def log_tail(self, num_lines: int = _LOG_LINES) -> str:
        """The last lines of the server's output."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])

    def stop(self) -> None:
        """SIGTERM, a grace time, then SIGKILL for all that is left; no effect when it has ended."""
        self._end(signal.SIGTERM, self._grace_s + _SUPERVISOR_SLACK_S)

    def kill(self) -> None:
        """SIGKILL the server and all its descendants at once, as a crash would."""
        self._end(signal.SIGQUIT, _SUPERVISOR_SLACK_S)

    def _end(self, number: signal.Signals, deadline_s: float) -> None:
        self._supervisor.send_signal(number)
        try:
            self._supervisor.wait(deadline_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self._supervisor.wait()
        self._supervisor.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_PROBE_TIMEOUT_S)
        try:
            connection.request("GET", self._health_path)
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _failure(self, what_happened: str) -> EngineFailed:
        return EngineFailed(
            f"{self.name} on port {self.port} {what_happened}; the end of {self.log_path}:\n"
            f"{self.log_tail()}"
        )


class Engine(Server):
    """A `vllm serve` process."""

    @classmethod
    def start(
        cls,
        model: Path | str,
        port: int,
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        *,
        log_path: Path,
    ) -> Self:
        """`vllm serve MODEL --port PORT EXTRA_ARGS...` with this interpreter's vLLM.

        Where vLLM is its CPU build, `default_environment()` fills in what is set neither in the
        present environment nor in `env`.
        """
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        command += ["--host", HOST, "--port", str(port), *extra_args]
        defaults = {k: v for k, v in default_environment().items() if k not in os.environ}
        return cls(f"engine {model}", command, port, log_path, defaults | dict(env or {}))


class ContextAgent(Server):
    """A `mcp-vllm agent` process that runs on its own."""

    @classmethod
    def start(cls, config_path: Path, port: int, *, log_path: Path) -> Self:
        """Start an agent whose configuration says that it listens on `port`."""
        command = [sys.executable, "-m", "mcp_vllm.cli.main", "agent"]
        command += ["--config", str(config_path)]
        return cls("context agent", command, port, log_path, health_path="/healthz", grace_s=5.0)
