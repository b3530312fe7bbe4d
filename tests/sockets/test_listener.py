"""Slow, idle and too many connections cost an agent nothing that others need."""

import asyncio
import contextlib
import time

import aiohttp
import pytest
from simulated import address, get, running_agent, settings, until
from simulated_security import SecuredSettings, tls_files

from mcp_vllm.agent import listener
from mcp_vllm.security.tls import client_context


@contextlib.asynccontextmanager
async def connections(agent, count: int):
    opened = [
        await asyncio.open_connection("127.0.0.1", agent.port, limit=1024) for _ in range(count)
    ]
    try:
        yield opened
    finally:
        for _, writer in opened:
            writer.transport.abort()


async def is_closed(reader: asyncio.StreamReader) -> bool:
    with contextlib.suppress(ConnectionError):
        while await reader.read(100):
            pass
    return True


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(listener, "HEAD_S", 0.8)
    monkeypatch.setattr(listener, "SWEEP_S", 0.05)


async def test_many_idle_connections_do_not_keep_others_out(tmp_path, monkeypatch):
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 16)
    async with running_agent(settings(), tmp_path / "a.sock") as agent:
        async with connections(agent, 200):
            assert (await get(agent, "/healthz"))[0] == 200
            assert len(agent._listener) <= 16
        await until(lambda: len(agent._listener) == 0, "the closed ones to be forgotten")


async def test_a_connection_at_work_is_not_the_one_that_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 4)
    async with (
        running_agent(settings(), tmp_path / "a.sock") as agent,
        connections(agent, 1) as one,
    ):
        reader, writer = one[0]
        writer.write(b"POST /v1/sessions/x/y/pin HTTP/1.1\r\nHost: a\r\nContent-Length: 13\r\n\r\n")
        await until(
            lambda: any(each.busy for each in agent._listener._connections.values()), "the request"
        )
        async with connections(agent, 20):
            assert (await get(agent, "/healthz"))[0] == 200
            writer.write(b'{"ttl_s": 60}')
            assert (await reader.readline()).startswith(b"HTTP/1.1 404")


async def test_when_all_are_at_work_a_further_one_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 2)
    async with (
        running_agent(settings(), tmp_path / "a.sock") as agent,
        connections(agent, 2) as two,
    ):
        for _, writer in two:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        for reader, _ in two:
            await reader.readuntil(b"}")
        for each in agent._listener._connections.values():
            each.busy = True
        async with connections(agent, 1) as further:
            assert await is_closed(further[0][0])


async def test_a_head_that_comes_drop_by_drop_is_given_up(tmp_path, quick):
    async with (
        running_agent(settings(), tmp_path / "a.sock") as agent,
        connections(agent, 2) as two,
    ):
        silent, slow = two
        started_s = time.monotonic()

        async def drip() -> None:
            with contextlib.suppress(ConnectionError):
                slow[1].write(b"GET /healthz HTTP/1.1\r\n")
                while True:
                    slow[1].write(b"X-A: b\r\n")
                    await slow[1].drain()
                    await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        assert await is_closed(silent[0])
        assert await is_closed(slow[0])
        assert time.monotonic() - started_s < 5
        dripping.cancel()


async def test_a_kept_connection_outlives_the_time_for_the_first_head(tmp_path, quick):
    async with (
        running_agent(settings(), tmp_path / "a.sock") as agent,
        aiohttp.ClientSession() as http,
    ):
        url = f"http://{address(agent)}/healthz"
        async with http.get(url):
            pass
        (before,) = agent._listener._connections.values()
        await asyncio.sleep(1.2)
        async with http.get(url):
            pass
        assert list(agent._listener._connections.values()) == [before]
        assert before.num_requests == 2


async def test_a_handshake_that_never_ends_is_given_up_and_makes_room(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 4)
    files = tls_files(tmp_path)
    config = SecuredSettings(tls=files).config()
    async with (
        running_agent(config, tmp_path / "a.sock") as agent,
        connections(agent, 20) as silent,
        aiohttp.ClientSession() as http,
    ):
        context = client_context(files.ca)
        async with http.get(f"https://{address(agent)}/healthz", ssl=context) as response:
            assert response.status == 200
        for reader, _ in silent:
            assert await is_closed(reader)


async def test_a_port_that_is_taken_is_refused_and_localhost_is_every_loopback(tmp_path):
    async with running_agent(settings(listen="localhost:0"), tmp_path / "a.sock") as agent:
        taken = settings(listen=f"127.0.0.1:{agent.port}")
        with pytest.raises(Exception, match=r"agent\.listen: cannot listen"):
            async with running_agent(taken, tmp_path / "b.sock"):
                pass
