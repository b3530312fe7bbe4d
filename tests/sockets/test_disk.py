"""An agent with a disk: what memory lost, and what a killed agent had, is served from there."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import aiohttp
import pytest
from restartable_agent import RestartableAgent, contents, started
from simulated import (
    CHUNK_BYTES,
    SimulatedEngine,
    get,
    get_json,
    keys,
    metric,
    pattern,
    running_agent,
    settings,
    until,
)
from simulated_sessions import ALICE, CHAINS, NAMES, call, engine_with_session

from mcp_vllm.config import Config
from mcp_vllm.link import protocol

MIB = 1 << 20
GROUP_BYTES = 16 << 10


def with_disk(folder: Path, *peers: str, **agent: object) -> Config:
    return settings(*peers, disk={"path": folder / "disk", "bytes": 64 * MIB}, **agent)


async def until_on_disk(agent, count: int) -> None:
    disk = agent._context.tiers.disk
    await until(lambda: disk.size().num_chunks >= count, f"{count} chunks on disk")


async def store_many(engine: SimulatedEngine, count: int) -> list[bytes]:
    names = keys(*range(count))
    for number in range(count):
        engine.fill(0, number)
        await engine.store([names[number]], [0])
    return names


async def load_all(engine: SimulatedEngine, names: list[bytes]):
    """Load them one by one into host chunk 1; the bytes of each that came."""
    came = {}
    engine.prepare("load")
    for name in names:
        done = await engine.load("load", [name], [1])
        if not done.failed:
            came[name] = engine.payload(1)
    return came


def right_bytes(names: list[bytes]) -> dict[bytes, bytes]:
    return {
        name: pattern(int.from_bytes(name[:32], "big"), CHUNK_BYTES)[:GROUP_BYTES].tobytes()
        for name in names
    }


async def text_of(agent: RestartableAgent, path: str) -> str:
    async with aiohttp.ClientSession() as http, http.get(f"http://{agent.address}{path}") as got:
        return await got.text()


async def until_metric(agent: RestartableAgent, line: str) -> None:
    async with asyncio.timeout(30):
        while line not in (await text_of(agent, "/metrics")).splitlines():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_killed_agent_has_its_chunks_and_sessions_again(tmp_path: Path) -> None:
    agent = RestartableAgent(tmp_path, "a", with_disk(tmp_path))
    with started(agent):
        with SimulatedEngine(tmp_path / "a.sock") as engine:
            await engine.connected()
            for chunk_id in range(4):
                engine.fill(chunk_id, chunk_id)
            await engine.store(NAMES, [0, 1, 2, 3])
            engine.prepare("turn", "alice")
            engine.link.send(protocol.Finish("turn", CHAINS, 48))
            await until_metric(agent, "mcp_agent_disk_chunks 4.0")
            before = await contents(agent, ALICE)
            await until(lambda: (tmp_path / "disk" / "sessions.journal").exists(), "the journal")
            agent.kill()
        agent.start()
        with SimulatedEngine(tmp_path / "a.sock") as engine:
            await engine.connected()
            engine.prepare("next", "alice")
            assert await engine.lookup("next", NAMES) == [1, 1, 1, 1]
            await engine.told_of("default", NAMES)
            done = await engine.load("next", NAMES[:3], [5, 6, 7])
            assert not done.failed
            for number in range(3):
                assert (
                    engine.payload(5 + number)
                    == pattern(number, CHUNK_BYTES)[:GROUP_BYTES].tobytes()
                )
            # The session's next turn is its second.
            engine.link.send(protocol.Finish("next", CHAINS, 60))
            assert await contents(agent, ALICE) == before
            await until_metric(agent, 'mcp_agent_loaded_chunks_total{source="disk"} 3.0')
        agent.kill()
        agent.start()
        assert await contents(agent, ALICE) == before


async def test_what_memory_has_no_room_for_is_served_from_disk(tmp_path: Path) -> None:
    config = with_disk(tmp_path, ram_bytes=MIB, codec="raw")
    async with running_agent(config, tmp_path / "a.sock") as agent:
        with SimulatedEngine(tmp_path / "a.sock") as engine:
            await engine.connected()
            names = await store_many(engine, 200)
            await until_on_disk(agent, 200)
            assert len(agent._context.store) < 100
            engine.prepare("r")
            assert await engine.lookup("r", names) == [1] * 200
            await engine.told_of("default", names)
            assert await load_all(engine, names[:40]) == right_bytes(names[:40])
            assert metric(agent, "mcp_agent_loaded_chunks_total", source="disk") >= 30
            # The last ones came up into memory.
            assert all(name in {held.key for held in agent._context.store} for name in names[30:40])
            agent._context.store.check_integrity()
            health = await get_json(agent, "/healthz")
            assert health["disk"]["status"] == "ok"
            assert health["disk"]["chunks"] == 200
            _, text = await get(agent, "/metrics")
            assert "mcp_agent_disk_writes 200.0" in text
            assert "mcp_agent_disk_full 0.0" in text


async def test_a_peer_is_sent_what_is_on_disk_only(tmp_path: Path) -> None:
    config = with_disk(tmp_path, ram_bytes=MIB, codec="raw")
    async with contextlib.AsyncExitStack() as stack:
        a = await stack.enter_async_context(running_agent(config, tmp_path / "a.sock"))
        b_config = settings(f"127.0.0.1:{a.port}")
        await stack.enter_async_context(running_agent(b_config, tmp_path / "b.sock"))
        engine_a = await stack.enter_context(SimulatedEngine(tmp_path / "a.sock")).connected()
        engine_b = await stack.enter_context(SimulatedEngine(tmp_path / "b.sock")).connected()
        names = await store_many(engine_a, 150)
        await until_on_disk(a, 150)
        engine_b.prepare("r")
        assert await engine_b.lookup("r", names[:8]) == [1] * 8
        done = await engine_b.load("r", names[:8], list(range(2, 10)))
        assert not done.failed
        for number in range(8):
            assert engine_b.payload(2 + number) == right_bytes(names[:8])[names[number]]


async def test_a_deleted_session_is_on_no_disk_any_more(tmp_path: Path) -> None:
    async with (
        running_agent(with_disk(tmp_path), tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path) as engine,
    ):
        await until_on_disk(agent, 4)
        assert (await call(agent, "DELETE", ALICE))[0] == 204
        engine.prepare("r")
        assert await engine.lookup("r", NAMES) == [0, 0, 0, 0]
        await until(lambda: not agent._context.tiers.disk.size().num_chunks, "the discard")
    async with running_agent(with_disk(tmp_path), tmp_path / "a.sock") as agent:
        assert agent._context.tiers.disk.size().num_chunks == 0
        assert len(agent._context.sessions) == 0


async def test_a_chunk_that_is_damaged_on_disk_is_a_failed_load_and_then_a_miss(
    tmp_path: Path,
) -> None:
    async with (
        running_agent(with_disk(tmp_path), tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path),
    ):
        await until_on_disk(agent, 4)
    for path in (tmp_path / "disk").glob("*.frames"):
        body = bytearray(path.read_bytes())
        body[10] ^= 1
        path.write_bytes(body)
    async with running_agent(with_disk(tmp_path), tmp_path / "a.sock") as agent:
        with SimulatedEngine(tmp_path / "a.sock") as engine:
            await engine.connected()
            engine.prepare("r")
            assert await engine.lookup("r", NAMES) == [1, 1, 1, 1]
            failed = [
                name for name in NAMES[:3] if (await engine.load("r", [name], [5])).failed
            ] or NAMES[3:]
            assert len(failed) == 1
            if failed == NAMES[3:]:
                assert (await engine.load("r", failed, [5])).failed
            await until(lambda: agent._context.tiers.disk.damaged == 1, "the damage to be counted")
            present = await engine.lookup("r", NAMES)
            assert [name for name, has in zip(NAMES, present, strict=True) if not has] == failed


async def test_an_agent_whose_folder_is_taken_works_without_a_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        running_agent(with_disk(tmp_path), tmp_path / "a.sock"),
        running_agent(with_disk(tmp_path), tmp_path / "b.sock") as second,
        engine_with_session(second, tmp_path, name="b"),
    ):
        assert "another process uses" in caplog.text
        assert (await get_json(second, "/healthz"))["disk"] == {"status": "unusable"}
        assert await contents_of(second)


async def contents_of(agent) -> int:
    status, archive = await call(agent, "GET", f"{ALICE}/export")
    assert status == 200
    return len(archive)
