"""A real engine whose only peer misbehaves: every request ends by recompute, with the right tokens.

The peer stands between the engine's agent and a good agent that has all blocks: it passes lookups
on and breaks what the case says.
"""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

from mcp_vllm.agent import wire
from mcp_vllm.demo.engines import Engine, free_port
from mcp_vllm.demo.pair import ENGINE_ARGS, START_DEADLINE_S, Pair
from tests.integration.conftest import SETTINGS
from tests.integration.engine_client import (
    FLOAT32,
    assert_same_or_near_tie,
    complete,
    labelled_counters,
)
from tests.integration.prompts import prompts
from tests.integration.test_preemption_and_agent_loss import agent_of
from tests.waiting import wait_for

pytestmark = pytest.mark.engine
NUM_CHARS = 1500
LOOKUP_MS = 2000
STALL_MS = 3000
LOAD_MS = 10_000

Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class BetweenPeer:
    """An HTTP server in a thread of its own; `fetch` and `lookup` may be replaced at any time."""

    def __init__(self, good_url: str) -> None:
        self._good_url = good_url
        # Bound all the time, or an outgoing connection of somebody may take the port meanwhile; it
        # does not listen, so a connection is refused while the server is closed.
        self._placeholder = socket.socket()
        self._placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._placeholder.bind(("127.0.0.1", 0))
        self.port = self._placeholder.getsockname()[1]
        self.loop = asyncio.new_event_loop()
        self.reset()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._server: asyncio.Server | None = None

    def reset(self) -> None:
        self.lookup: Handler = self.pass_on("lookup")
        self.fetch: Handler = self.pass_on("fetch")

    def listen(self) -> None:
        start = asyncio.start_server(self._serve, "127.0.0.1", self.port, reuse_port=True)
        self._server = asyncio.run_coroutine_threadsafe(start, self.loop).result(10)

    def close(self) -> None:
        if self._server is not None:
            self.loop.call_soon_threadsafe(self._server.close)
            self._server = None

    def pass_on(self, what: str) -> Handler:
        async def handler(body: bytes, writer: asyncio.StreamWriter) -> None:
            answer = await self.good(what, body)
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + answer)

        return handler

    async def good(self, what: str, body: bytes) -> bytes:
        """What the good agent answers."""
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{self._good_url}/v1/blocks/{what}", data=body) as response,
        ):
            return await response.read()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        size = int(head.partition("content-length:")[2].partition("\r\n")[0] or 0)
        body = await reader.readexactly(size)
        path = head.partition("\r\n")[0]
        handler = self.lookup if "lookup" in path else self.fetch if "fetch" in path else not_there
        try:
            await handler(body, writer)
            await writer.drain()
        finally:
            writer.close()


@pytest.fixture(scope="module")
def good(tiny_model, log_folder):
    """The host that has computed everything."""
    with Pair(log_folder, SETTINGS, names=("A",)) as pair:
        pair.start_engines(tiny_model("llama"), FLOAT32)
        yield pair["A"]


@pytest.fixture(scope="module")
def between(good):
    peer = BetweenPeer(good.agent_url)
    yield peer
    peer.close()


@pytest.fixture(scope="module")
def engine(tiny_model, log_folder, between):
    timing = {
        "lookup_ms": LOOKUP_MS,
        "stall_ms": STALL_MS,
        "load_ms": LOAD_MS,
        "load_policy": "always",
    }
    config = {
        "host_cache_bytes": "256MiB",
        "agent": {"listen": "127.0.0.1:0", "ram_bytes": "1GiB", **timing},
        "peers": [f"127.0.0.1:{between.port}"],
    }
    ours = ("--kv-connector", "mcp", "--mcp-config", json.dumps(config))
    log_path = log_folder / "engine-bad-peer.log"
    start = Engine.start(
        tiny_model("llama"), free_port(), [*ENGINE_ARGS, *FLOAT32, *ours], log_path=log_path
    )
    with start as engine:
        engine.wait_ready(START_DEADLINE_S)
        yield engine


async def not_there(body: bytes, writer: asyncio.StreamWriter) -> None:
    """It has no directory, so it is asked for each request."""
    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


async def never(body: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


def cut_after(between: BetweenPeer, share: float, then: Handler | None) -> Handler:
    async def handler(body: bytes, writer: asyncio.StreamWriter) -> None:
        answer = await between.good("fetch", body)
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
        writer.write(head + answer[: int(share * len(answer))])
        await writer.drain()
        if then is not None:
            await then(body, writer)

    return handler


def damaged(between: BetweenPeer) -> Handler:
    async def handler(body: bytes, writer: asyncio.StreamWriter) -> None:
        answer = bytearray(await between.good("fetch", body))
        position = 0
        while True:
            index, _, _, size = wire.FRAME_HEAD.unpack_from(answer, position)
            position += wire.FRAME_HEAD.size
            if index == wire.END_INDEX:
                break
            answer[position + size // 2] ^= 1
            position += size
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + bytes(answer))

    return handler


async def claims_a_terabyte(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    writer.write(wire.FRAME_HEAD.pack(0, 0, 0, 1 << 40) + b"x" * 4096)
    await writer.drain()
    await asyncio.Event().wait()


CASES = {
    "closes in mid-stream": (lambda b: cut_after(b, 0.6, None), "closed"),
    "stalls in mid-stream": (lambda b: cut_after(b, 0.6, never), "timeout"),
    "sends a wrong checksum": (lambda b: damaged(b), "checksum"),
    "claims a terabyte": (lambda b: claims_a_terabyte, "oversized"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_transfer_ends_in_recompute_that_says_so(good, between, engine, case):
    break_fetch, cause = CASES[case]
    between.reset()
    between.listen()
    try:
        fresh_agent(engine)
        between.fetch = break_fetch(between)
        prompt = f"When it {case}: {prompts(1, NUM_CHARS)[0]}"
        reference = complete(good.engine.base_url, prompt)
        answer = complete(engine.base_url, prompt)
    finally:
        between.close()
    assert_same_or_near_tie(reference, answer, case)
    counted = f'cause="{cause}"'
    wait_for(
        f"{cause} in the engine's metrics",
        lambda: any(
            name.startswith("vllm:mcp_failed_chunks_total") and counted in name and value > 0
            for name, value in labelled_counters(engine.base_url).items()
        ),
    )
    log = engine.log_path.read_text(errors="replace")
    assert f"chunks could not be brought ({cause}" in log


@pytest.mark.parametrize("case", ["is down", "accepts and never answers"])
def test_a_silent_peer_is_a_miss(good, between, engine, case):
    between.reset()
    if case != "is down":
        between.lookup = never
        between.listen()
    try:
        fresh_agent(engine)
        prompt = f"When it {case}: {prompts(1, NUM_CHARS)[0]}"
        reference = complete(good.engine.base_url, prompt)
        started_s = time.monotonic()
        answer = complete(engine.base_url, prompt)
        elapsed_s = time.monotonic() - started_s
    finally:
        between.close()
    assert answer.params["imported_tokens"] == 0
    assert_same_or_near_tie(reference, answer, case)
    print(f"{case}: {elapsed_s:.2f} s for the whole request")
    wait_for("the peer's failure in the agent's log", lambda: failure_logged(engine, between))


def test_the_good_peer_behind_it_is_used_when_it_behaves(good, between, engine):
    between.reset()
    between.listen()
    try:
        fresh_agent(engine)
        prompt = f"When it behaves: {prompts(1, NUM_CHARS)[0]}"
        reference = complete(good.engine.base_url, prompt)
        answer = complete(engine.base_url, prompt)
    finally:
        between.close()
    assert answer.params["imported_tokens"] > 0
    assert_same_or_near_tie(reference, answer, "behaving")


def failure_logged(engine, between) -> bool:
    log = engine.log_path.read_text(errors="replace")
    return any(f"peer 127.0.0.1:{between.port}: {cause}" in log for cause in ("connect", "timeout"))


def fresh_agent(engine) -> None:
    """Kill the engine's agent, so that the next case meets one without a grudge."""
    pid = wait_for("an agent", lambda: agent_of(engine)).pid
    os.kill(pid, signal.SIGKILL)
    wait_for(
        "another agent",
        lambda: (agent := agent_of(engine)) is not None and agent.pid != pid,
        deadline_s=60,
    )
    wait_for("the link", lambda: connections(engine) > 0 and is_linked(engine), deadline_s=60)


def connections(engine) -> int:
    return engine.log_path.read_text(errors="replace").count("connected to context agent")


def is_linked(engine) -> bool:
    """A request's step publishes whether the agent is connected."""
    complete(engine.base_url, f"Linked? {time.monotonic()}", 2)
    up = labelled_counters(engine.base_url)
    return any(name.startswith("vllm:mcp_agent_up") and value == 1 for name, value in up.items())
