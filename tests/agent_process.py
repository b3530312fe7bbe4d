"""A real agent in a process of its own, which can be stopped and killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
from waiting import wait_for

from mcp_vllm.config import Address, Config
from mcp_vllm.link.supervisor import READY_LINE


class AgentProcess:
    """Running from the start; `config` names a fixed port."""

    def __init__(self, config: Config, socket_path: Path) -> None:
        self.address = config.agent.listen
        assert Address.parse(self.address).port
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mcp_vllm.agent", "--socket", str(socket_path)],
            env={**os.environ, "MCP_VLLM_CONFIG_JSON": config.to_json()},
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == READY_LINE

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, signum: signal.Signals) -> None:
        self._process.send_signal(signum)

    def kill(self) -> None:
        """Also when it is stopped; idempotent."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def agent_process(config: Config, socket_path: Path) -> Iterator[AgentProcess]:
    process = AgentProcess(config, socket_path)
    try:
        wait_for("the agent to answer", lambda: _is_healthy(process.address))
        yield process
    finally:
        process.kill()


def _is_healthy(address: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://{address}/healthz", timeout=5).is_success
    return False
