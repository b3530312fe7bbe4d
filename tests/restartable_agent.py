"""Agents as processes of their own, to be killed; a session for them to have; and what they have,
byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import numpy as np
from simulated import CHUNK_BYTES, SimulatedEngine, address, keys
from simulated_sessions import ALICE, call

from mcp_vllm.codec import decode_frame_into, read_header
from mcp_vllm.config import Config
from mcp_vllm.demo.engines import free_port
from mcp_vllm.link import protocol
from mcp_vllm.link.supervisor import READY_LINE
from mcp_vllm.session.archive import ArchiveReader

MAX_RAW_BYTES = 1 << 24
NUM_CHUNKS = 160
GROUP_BYTES = 16 << 10


class RestartableAgent:
    """`python -m mcp_vllm.agent` with a configuration of its own; killed at the end.

    Attributes:
        port: where it listens; the same after a restart.
    """

    def __init__(self, folder: Path, name: str, config: Config) -> None:
        self.port = free_port()
        self.socket = folder / f"{name}.sock"
        self.log = folder / f"{name}.log"
        agent = config.agent.model_copy(update={"listen": f"127.0.0.1:{self.port}"})
        self._config = config.model_copy(update={"agent": agent})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns when it listens."""
        command = [sys.executable, "-m", "mcp_vllm.agent", "--socket", str(self.socket)]
        environment = os.environ | {"MCP_VLLM_CONFIG_JSON": self._config.to_json()}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=log
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line == READY_LINE, self.log.read_text()

    def pause(self) -> None:
        """Stop it where it is; `kill` ends it there."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """As the kernel does it; idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


@contextlib.contextmanager
def started(*agents: RestartableAgent) -> Iterator[None]:
    try:
        for agent in agents:
            agent.start()
        yield
    finally:
        for agent in agents:
            agent.kill()


async def contents(agent: RestartableAgent, session: str) -> dict[bytes, bytes]:
    """The raw bytes of each chunk of a session, by its export; raises unless it is whole."""
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"http://{address(agent)}{session}/export") as answer,
    ):
        assert answer.status == 200, await answer.text()
        return decoded(await answer.read())


def decoded(archive: bytes) -> dict[bytes, bytes]:
    reader, chunks = ArchiveReader(), {}
    for archived in reader.feed(archive):
        header = read_header(archived.frame, max_raw_size=MAX_RAW_BYTES)
        raw = memoryview(bytearray(header.raw_size))
        decode_frame_into(archived.frame, raw, key=header.key)
        chunks[header.key] = bytes(raw)
    reader.close()
    return chunks


def noise(number: int) -> np.ndarray:
    """What no codec makes smaller, so that writing and sending take a while."""
    return np.random.default_rng(number).integers(0, 256, CHUNK_BYTES, dtype=np.uint8)


def expected(num_chunks: int) -> dict[bytes, bytes]:
    names = keys(*range(num_chunks))
    return {name: noise(n)[:GROUP_BYTES].tobytes() for n, name in enumerate(names)}


EXPECTED = expected(NUM_CHUNKS)


async def give_session(agent: RestartableAgent, num_chunks: int = NUM_CHUNKS) -> None:
    names = keys(*range(num_chunks))
    with SimulatedEngine(agent.socket, num_chunks=num_chunks) as engine:
        await engine.connected()
        for number in range(num_chunks):
            engine.rows[number] = noise(number)
        assert not (await engine.store(names, range(num_chunks))).failed
        engine.prepare("r", "alice")
        engine.link.send(protocol.Finish("r", [names, []], 16 * num_chunks))
        await until_awaited(lambda: is_there(agent), "the session")


async def until_awaited(condition: Callable[[], Awaitable[object]], what: str) -> None:
    for _ in range(3000):
        if await condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"waited in vain for {what}")


async def is_there(agent: RestartableAgent) -> bool:
    return (await call(agent, "GET", ALICE))[0] == 200
