"""The supervisor with real agent processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from simulated import SimulatedEngine, settings, wait_until

from mcp_vllm.link import supervisor
from mcp_vllm.link.client import AgentStarting
from mcp_vllm.link.protocol import LinkError
from mcp_vllm.link.supervisor import AgentSupervisor


def has_ended(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def test_an_agent_that_is_killed_comes_back_and_ends_with_us(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    keeper = AgentSupervisor(settings().to_json(), str(path))
    try:
        with SimulatedEngine(path, before_connect=keeper.ensure_running) as engine:
            wait_until(lambda: engine.link.connected, "the agent")
            first = keeper.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: engine.link.counters.connects == 2, "the next agent")
            second = keeper.pid
            assert second not in (None, first)
            assert keeper.starts == 2
    finally:
        keeper.stop()
    assert has_ended(second)
    assert not path.exists(), "it ended by itself and cleaned up"
    with pytest.raises(LinkError):
        keeper.ensure_running()


def test_an_agent_ends_when_its_standard_input_does(tmp_path: Path) -> None:
    """As when the engine is killed: nobody is left to say stop."""
    path = tmp_path / "agent.sock"
    agent = subprocess.Popen(
        [sys.executable, "-m", "mcp_vllm.agent", "--socket", str(path), "--owned"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "MCP_VLLM_CONFIG_JSON": settings().to_json()},
    )
    assert agent.stdin is not None
    assert agent.stdout is not None
    with agent:
        assert agent.stdout.readline() == supervisor.READY_LINE
        agent.stdin.close()
        assert agent.wait(10) == 0
    assert not path.exists()


def test_an_agent_that_cannot_start_is_said_and_tried_ever_more_rarely(tmp_path: Path) -> None:
    path = tmp_path / "a-file"
    path.write_text("not a socket")
    keeper = AgentSupervisor(settings().to_json(), str(path))
    complaints: list[float] = []

    def attempt() -> int:
        try:
            keeper.ensure_running()
        except AgentStarting:
            pass
        except LinkError:
            complaints.append(time.monotonic())
        return keeper.starts

    try:
        wait_until(lambda: attempt() == 3, "three starts")
        assert complaints
        assert keeper._wait_s >= 2 * supervisor.RESTART_MIN_S
    finally:
        keeper.stop()
    assert path.read_text() == "not a socket"
