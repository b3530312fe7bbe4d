"""Starts and restarts the context agent that belongs to one engine host.

The agent is a child process; it ends when its standard input reaches end of file, which happens
however we end, kill -9 included. It says "ready" on its standard output once it listens.
"""

from __future__ import annotations

import logging
import os
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from blake3 import blake3

from mcp_vllm.link.client import AgentStarting
from mcp_vllm.link.protocol import LinkError

logger = logging.getLogger(__name__)

READY_LINE = b"ready\n"
START_DEADLINE_S = 30.0
STOP_GRACE_S = 3.0
# An agent that ends sooner than this after its start is restarted more and more slowly.
SETTLED_S = 10.0
RESTART_MIN_S = 0.1
RESTART_MAX_S = 10.0


def own_socket_path(engine_id: str) -> Path:
    """Where this host's engines find the agent that rank 0 starts; ranks differ in `_dp<rank>`."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    name = blake3(engine_id.rsplit("_dp", 1)[0].encode()).hexdigest(8)
    return Path(base) / f"mcp-vllm-{os.getuid()}" / f"{name}.sock"


class AgentSupervisor:
    """Keeps one agent process alive; used from the link's thread only, `stop` from any.

    Args:
        config_json: the agent's whole configuration, handed over in its environment.
        socket_path: where it shall listen for engines.
    """

    def __init__(self, config_json: str, socket_path: str) -> None:
        self._config_json = config_json
        self._socket_path = socket_path
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._started_s = 0.0
        self._wait_s = 0.0
        self._next_start_s = 0.0
        self._stopped = False
        self.starts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def ensure_running(self) -> None:
        """Start the agent unless it runs.

        Raises:
            AgentStarting: started, but not ready yet.
            LinkError: it does not come up.
        """
        if self._stopped:
            raise LinkError("the engine is shutting down")
        if self._process is not None and self._process.poll() is not None:
            self._bury(self._process)
        if self._process is None:
            if time.monotonic() < self._next_start_s:
                raise LinkError("the context agent ended soon after its start, see its last lines")
            self._start()
        if self._ready:
            return
        if self._said_ready():
            self._ready = True
            return
        if time.monotonic() - self._started_s > START_DEADLINE_S:
            self._kill()
            raise LinkError(f"the context agent was not ready within {START_DEADLINE_S:.0f} s")
        raise AgentStarting("the context agent is starting")

    def stop(self) -> None:
        """End the agent, if it is ours; returns when it is gone."""
        self._stopped = True
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self._kill()
        _close_pipes(process)

    def _bury(self, process: subprocess.Popen[bytes]) -> None:
        """Note that the agent has ended, and when another may be started."""
        logger.info(
            "context agent (pid %d) ended with status %s: starting another",
            process.pid,
            process.returncode,
        )
        _close_pipes(process)
        self._process = None
        now_s = time.monotonic()
        self._next_start_s = now_s + self._wait_s
        if now_s - self._started_s > SETTLED_S:
            self._next_start_s, self._wait_s = now_s, 0.0
        self._wait_s = min(max(2 * self._wait_s, RESTART_MIN_S), RESTART_MAX_S)

    def _start(self) -> None:
        self._ready = False
        self._started_s = time.monotonic()
        self.starts += 1
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mcp_vllm.agent", "--socket", self._socket_path, "--owned"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "MCP_VLLM_CONFIG_JSON": self._config_json},
            # Not in the terminal's foreground group: Ctrl-C ends the engine, and the engine's end
            # ends the agent, in that order.
            start_new_session=True,
        )

    def _said_ready(self) -> bool:
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(0):
                return False
        return self._process.stdout.readline() == READY_LINE

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
