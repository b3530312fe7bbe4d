"""Waiting for servers to come to rest: against real processes, busy and idle."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import psutil
import pytest
from waiting import wait_for

from mcp_vllm.demo.quiet import wait_until_quiet

BUSY = "while True: pass"
IDLE = "import time; time.sleep(600)"


@dataclass
class Parent:
    """Stands for a server: its supervisor, whose child does the work."""

    pid: int


@pytest.fixture
def start():
    processes = []

    def start_parent(child_code):
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child_code!r}])"
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        processes.append(process)
        return Parent(process.pid)

    yield start_parent
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_idle_processes_are_quiet(start):
    assert wait_until_quiet([start(IDLE), start(IDLE)], 30)


def test_a_busy_child_is_not(start):
    idle, busy = start(IDLE), start(BUSY)
    wait_for("the child to be busy", lambda: child_seconds(busy) > 0.2)
    assert not wait_until_quiet([idle, busy], 1.5)


def child_seconds(parent):
    children = psutil.Process(parent.pid).children(recursive=True)
    return sum(child.cpu_times().user for child in children)


def test_processes_that_ended_are_quiet():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert wait_until_quiet([Parent(process.pid)], 30)
