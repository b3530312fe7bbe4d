"""Two places for agents with a link of known speed between them, for benchmarks.

`network_link` is a real one: two network namespaces, a veth pair, and `tc tbf` on both ends (Linux,
root, iproute2). `proxy_link` is the fallback: two TCP proxies in a thread of this process, which
carry that many bytes a second.
"""

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from throttle import Throttle

from mcp_vllm.demo.engines import HOST, free_port

# What passes at once before the rate holds, as time at that rate: more would hide the rate from
# whoever measures it by a few messages.
BURST_S = 0.0004
QUEUE = "50ms"


@dataclass(frozen=True)
class Place:
    """Where one agent runs.

    Attributes:
        prefix: in front of its command.
        listen: HOST:PORT for its configuration.
        reached_at: HOST:PORT at which the other agent reaches it, over the link.
        url: where this process reaches it, beside the link.
    """

    prefix: tuple[str, ...]
    listen: str
    reached_at: str
    url: str


@dataclass(frozen=True)
class ShapedLink:
    """`what` it is, for the output; places A and B; its speed in bytes a second each way."""

    what: str
    places: tuple[Place, Place]
    bytes_s: float


class NoNetwork(Exception):
    """Namespaces cannot be made here, and why."""


@contextlib.contextmanager
def network_link(mbit_s: int) -> Iterator[ShapedLink]:
    """Raises NoNetwork where the machine does not allow it."""
    _remove_leftovers()
    pid = os.getpid()
    names = (f"mcp{pid}a", f"mcp{pid}b")
    with contextlib.ExitStack() as stack:
        for name in names:
            _run("ip", "netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
        first, second = names
        _run("ip", "link", "add", "mcp", "netns", first, "type", "veth",
             "peer", "name", "mcp", "netns", second)  # fmt: skip
        places = []
        for number, name in enumerate(names, start=1):
            _address(name, "mcp", f"10.77.0.{number}/24")
            _run("tc", "-n", name, "qdisc", "add", "dev", "mcp", "root", "tbf",
                 "rate", f"{mbit_s}mbit", "burst", _burst(mbit_s), "latency", QUEUE)  # fmt: skip
            ours, port = f"mcp{pid}{number}", free_port()
            _run("ip", "link", "add", ours, "type", "veth", "peer", "name", "own", "netns", name)
            _run("ip", "addr", "add", f"10.77.{number}.1/24", "dev", ours)
            _run("ip", "link", "set", ours, "up")
            _address(name, "own", f"10.77.{number}.2/24")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            places.append(
                Place(
                    ("ip", "netns", "exec", name),
                    f"0.0.0.0:{port}",
                    f"10.77.0.{number}:{port}",
                    f"http://10.77.{number}.2:{port}",
                )
            )
        what = f"two network namespaces, veth, tc tbf rate {mbit_s}mbit burst {_burst(mbit_s)}"
        yield ShapedLink(what, (places[0], places[1]), mbit_s * 1e6 / 8)


@dataclass(frozen=True)
class FarPlace:
    """A network namespace beside this one, with a veth pair between: for one server.

    Attributes:
        prefix: in front of the server's command.
        host: the server's address, as seen from here and from there.
    """

    prefix: tuple[str, ...]
    host: str
    devices: tuple[tuple[str, ...], ...]

    def shape(self, mbit_s: int | None) -> None:
        """Let both directions carry that much (`tc tbf`); None: as much as goes."""
        for tc, device in ((each[:-1], each[-1]) for each in self.devices):
            subprocess.run([*tc, "qdisc", "del", "dev", device, "root"], capture_output=True)
            if mbit_s is not None:
                _run(*tc, "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{mbit_s}mbit",
                     "burst", _burst(mbit_s), "latency", QUEUE)  # fmt: skip


def _remove_leftovers() -> None:
    """Namespaces of runs that were killed: their addresses are ours. The name has the run's pid."""
    places = Path("/run/netns")
    for name in (each.name for each in places.iterdir()) if places.exists() else ():
        owner = re.fullmatch(r"mcp(\d+)[abf]", name)
        if owner is not None and not Path("/proc", owner[1]).exists():
            subprocess.run(["ip", "netns", "del", name], check=False)


@contextlib.contextmanager
def far_place() -> Iterator[FarPlace]:
    """Raises NoNetwork where the machine does not allow it."""
    _remove_leftovers()
    name = f"mcp{os.getpid()}f"
    with contextlib.ExitStack() as stack:
        _run("ip", "netns", "add", name)
        stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
        _run("ip", "link", "add", name, "type", "veth", "peer", "name", "own", "netns", name)
        _run("ip", "addr", "add", "10.78.0.1/24", "dev", name)
        _run("ip", "link", "set", name, "up")
        _address(name, "own", "10.78.0.2/24")
        _run("ip", "-n", name, "link", "set", "lo", "up")
        devices = (("tc", name), ("tc", "-n", name, "own"))
        yield FarPlace(("ip", "netns", "exec", name), "10.78.0.2", devices)


@contextlib.contextmanager
def proxy_link(mbit_s: float) -> Iterator[ShapedLink]:
    """The same over loopback proxies, which share the machine's cores."""
    bytes_s = mbit_s * 1e6 / 8
    ports = free_port(), free_port()
    with running_throttles([f"{HOST}:{port}" for port in ports], bytes_s) as throttles:
        places = [
            Place((), f"{HOST}:{port}", throttle.address, f"http://{HOST}:{port}")
            for port, throttle in zip(ports, throttles, strict=True)
        ]
        what = f"userspace TCP proxy of {mbit_s:g} Mbit/s on loopback (no real link)"
        yield ShapedLink(what, (places[0], places[1]), bytes_s)


@contextlib.contextmanager
def running_throttles(targets: list[str], bytes_s: float) -> Iterator[list[Throttle]]:
    """A proxy in front of each target, in a thread of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    throttles = [Throttle(target, bytes_s) for target in targets]
    stack = contextlib.AsyncExitStack()

    async def start() -> None:
        for throttle in throttles:
            await stack.enter_async_context(throttle.running())

    asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield throttles
    finally:
        asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _address(namespace: str, device: str, address: str) -> None:
    _run("ip", "-n", namespace, "addr", "add", address, "dev", device)
    _run("ip", "-n", namespace, "link", "set", device, "up")


def _burst(mbit_s: float) -> str:
    return f"{round(mbit_s * 1e6 / 8 * BURST_S)}b"


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except FileNotFoundError as error:
        raise NoNetwork(f"{command[0]} is not installed (iproute2)") from error
    except subprocess.CalledProcessError as error:
        raise NoNetwork(f"`{' '.join(command)}`: {error.stderr.strip()}") from error
