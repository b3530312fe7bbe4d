"""Ten thousand connections that send nothing, or never get to the end of a request, against an
agent with its real limits: it answers others all the while, and holds neither files nor memory."""

import asyncio
import contextlib
import resource
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest
from restartable_agent import RestartableAgent, started
from simulated import settings
from simulated_security import SecuredSettings, tls_files

from mcp_vllm.agent.listener import MAX_CONNECTIONS
from mcp_vllm.security.tls import client_context

NUM_CONNECTIONS = 10_000
AT_ONCE = 100
ANSWER_S = 5.0  # on a busy machine; without limits it would not come at all
# What so many connections as it keeps may take; a handshake takes 300 KB of buffers.
PLAIN_BYTES, TLS_BYTES = 64 << 20, 256 << 20
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.contextmanager
def many_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = NUM_CONNECTIONS + 1000
    if hard < needed:
        pytest.skip(f"this user may open {hard} files, {needed} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.asynccontextmanager
async def connected(agent: RestartableAgent, beginning: bytes) -> AsyncIterator[list[Connection]]:
    """So many connections that have sent that."""
    room, opened = asyncio.Semaphore(AT_ONCE), []

    async def connect() -> None:
        async with room:
            reader, writer = await asyncio.open_connection("127.0.0.1", agent.port, limit=1024)
            opened.append((reader, writer))
            writer.write(beginning)

    try:
        await asyncio.gather(*(connect() for _ in range(NUM_CONNECTIONS)))
        yield opened
    finally:
        for _, writer in opened:
            writer.transport.abort()


async def status_of(agent: RestartableAgent, scheme: str, path: str, context=None) -> int:
    """The status; 0 for an answer that says that the codecs are not loaded yet."""
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{scheme}://{agent.address}{path}", ssl=context or True) as answer,
    ):
        body = await answer.json()
        return 0 if body.get("codecs") == [] else answer.status


async def loaded_rss(agent, process, scheme: str, context=None) -> int:
    """What it holds once it has loaded what it loads beside its start."""
    while await status_of(agent, scheme, "/v1/peers", context) != 200:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    return process.memory_info().rss


async def answered_s(ask) -> float:
    started_s = time.monotonic()
    assert await ask() == 200
    return time.monotonic() - started_s


@pytest.mark.parametrize(
    "beginning",
    [b"", pytest.param(b"GET /healthz HTTP/1.1\r\nX-A: ", marks=pytest.mark.slow)],
    ids=["nothing", "half a request"],
)
async def test_ten_thousand_silent_connections_keep_nobody_out(tmp_path: Path, beginning: bytes):
    agent = RestartableAgent(tmp_path, "a", settings())

    async def health() -> int:
        return await status_of(agent, "http", "/healthz")

    with many_files(), started(agent):
        process = psutil.Process(agent.pid)
        before = await loaded_rss(agent, process, "http")
        opening = asyncio.create_task(_held_open(agent, beginning, process, health))
        while not opening.done():
            assert await answered_s(health) < ANSWER_S
            await asyncio.sleep(0.05)
        num_files, num_bytes = await opening
        assert num_files < MAX_CONNECTIONS + 100
        assert num_bytes - before < PLAIN_BYTES
    said = [line for line in agent.log.read_text().splitlines() if "connection" in line]
    assert 1 <= len(said) <= 3
    assert "idle ones are closed" in said[0]


async def _held_open(agent, beginning, process, health) -> tuple[int, int]:
    """(Files, bytes) that the agent holds while all connections were made."""
    async with connected(agent, beginning) as all_of_them:
        assert len(all_of_them) == NUM_CONNECTIONS
        assert await answered_s(health) < ANSWER_S
        return process.num_fds(), process.memory_info().rss


async def test_ten_thousand_tls_connections_without_a_handshake_keep_nobody_out(tmp_path: Path):
    files = tls_files(tmp_path)
    agent = RestartableAgent(tmp_path, "a", SecuredSettings(tls=files).config())
    with many_files(), started(agent):
        process = psutil.Process(agent.pid)
        context = client_context(files.ca, files.certificate, files.key)
        before = await loaded_rss(agent, process, "https", context)
        async with connected(agent, b"\x16\x03\x01"):
            assert process.num_fds() < MAX_CONNECTIONS + 100
            assert process.memory_info().rss - before < TLS_BYTES
            health = status_of(agent, "https", "/healthz", context)
            assert await answered_s(lambda: health) < ANSWER_S
