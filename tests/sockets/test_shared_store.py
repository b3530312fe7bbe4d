"""Agents that share a store in a real Redis (or Valkey) server and are no peers of each other."""

import asyncio
from contextlib import ExitStack, asynccontextmanager

import pytest
import redis
from redis_server import RedisServer, needs_redis, running_redis
from simulated import SimulatedEngine, get_json, keys, metric, running_agent, settings, until
from simulated_security import seal_keys
from simulated_sessions import ALICE, NAMES, call, engine_with_session

from mcp_vllm.config import Config, ConfigError
from mcp_vllm.link.protocol import GroupLayout
from mcp_vllm.store.shared.value import PREFIX

pytestmark = needs_redis
WHERE = [20, 21, 22, 23]


@pytest.fixture
def server(tmp_path):
    with running_redis(tmp_path) as server:
        yield server


def sharing(server: RedisServer, **shared: object) -> Config:
    return settings(shared={"url": server.url, **shared}, lookup_ms=1000)


def with_seal_key(config: Config, folder) -> Config:
    security = config.security.model_copy(update={"seal_keys": seal_keys(folder, "a")})
    return config.model_copy(update={"security": security})


@asynccontextmanager
async def writer_and_reader(folder, config: Config, other: Config | None = None):
    """((agent, engine) that has stored NAMES and written them, (another agent, its engine))."""
    async with (
        running_agent(config, folder / "w.sock") as writer,
        running_agent(other or config, folder / "r.sock") as reader,
    ):
        with ExitStack() as stack:
            first, second = (
                stack.enter_context(SimulatedEngine(folder / f"{name}.sock")) for name in "wr"
            )
            await first.connected()
            await second.connected()
            for chunk_id in range(4):
                first.fill(chunk_id, chunk_id)
            await first.store(NAMES, [0, 1, 2, 3])
            shared = writer._context.tiers.shared
            await until(lambda: shared.writes + shared.drops["unsealed"] == 4, "the writes")
            yield (writer, first), (reader, second)


def values(server: RedisServer) -> dict[bytes, bytes]:
    with redis.Redis(port=server.port) as client:
        return {key: client.get(key) for key in client.scan_iter(PREFIX + b"*")}


def change(server: RedisServer, new: dict[bytes, bytes]) -> None:
    with redis.Redis(port=server.port) as client:
        for key, value in new.items():
            client.set(key, value)


async def test_what_one_host_has_stored_another_loads_byte_for_byte(tmp_path, server):
    async with writer_and_reader(tmp_path, sharing(server)) as ((_, first), (reader, second)):
        second.prepare("r")
        assert await second.lookup("r", NAMES) == [1] * 4
        done = await second.load("r", NAMES, WHERE)
        assert not done.failed
        for index, group in enumerate((0, 0, 0, 1)):
            assert second.payload(20 + index, group) == first.payload(index, group)
        assert metric(reader, "mcp_agent_loaded_chunks_total", source="shared") == 4
        assert await second.lookup("r", keys(77)) == [0]


async def test_a_block_has_its_time_to_live_and_each_use_renews_it(tmp_path, server):
    async with writer_and_reader(tmp_path, sharing(server, ttl_s=1000)) as (_, (_, second)):
        with redis.Redis(port=server.port) as client:
            names = list(values(server))
            assert all(900 < client.ttl(name) <= 1000 for name in names)
            for name in names:
                client.expire(name, 50)
            second.prepare("r")
            await second.lookup("r", NAMES)
            await second.load("r", NAMES, WHERE)
            assert all(client.ttl(name) > 900 for name in names)


def flipped(value: bytes, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: flipped(value, len(value) - 1),
        lambda value: value[:-1],
        lambda value: value + b"x",
        lambda value: flipped(value, 30),
        lambda value: b"",
    ],
    ids=["a flipped bit", "cut short", "too long", "a damaged head", "empty"],
)
async def test_a_damaged_value_is_a_miss_and_never_served(tmp_path, server, spoil):
    async with writer_and_reader(tmp_path, sharing(server)) as (_, (_, second)):
        change(server, {key: spoil(value) for key, value in values(server).items()})
        second.prepare("r")
        if any(await second.lookup("r", NAMES)):
            done = await second.load("r", NAMES, WHERE)
            assert len(done.failed) == 4
        assert await second.lookup("r", NAMES) == [0] * 4


async def test_values_that_were_exchanged_are_misses(tmp_path, server):
    async with writer_and_reader(tmp_path, sharing(server)) as (_, (_, second)):
        held = values(server)
        names = list(held)
        change(
            server, dict(zip(names, [held[name] for name in (*names[1:], names[0])], strict=True))
        )
        second.prepare("r")
        assert await second.lookup("r", NAMES) == [0] * 4


async def test_another_tenant_does_not_find_it(tmp_path, server):
    async with writer_and_reader(tmp_path, sharing(server)) as (_, (_, second)):
        second.prepare("r", tenant="mallory")
        assert await second.lookup("r", NAMES, tenant="mallory") == [0] * 4


async def test_a_tenant_with_a_key_has_sealed_blocks_there_which_others_cannot_use(
    tmp_path, server
):
    plain = sharing(server)
    sealed = with_seal_key(plain, tmp_path)
    async with writer_and_reader(tmp_path, sealed, plain) as ((_, first), (_, second)):
        assert all(b"MCPX" in value for value in values(server).values())
        second.prepare("r")
        assert await second.lookup("r", NAMES) == [0] * 4
        async with running_agent(sealed, tmp_path / "s.sock"):
            with SimulatedEngine(tmp_path / "s.sock") as third:
                await third.connected()
                third.prepare("r")
                assert await third.lookup("r", NAMES) == [1] * 4
                assert not (await third.load("r", NAMES, WHERE)).failed
                assert third.payload(20) == first.payload(0)


async def test_who_has_a_key_does_not_believe_blocks_that_are_not_sealed(tmp_path, server):
    plain = sharing(server)
    sealed = with_seal_key(plain, tmp_path)
    async with writer_and_reader(tmp_path, plain, sealed) as (_, (_, second)):
        second.prepare("r")
        assert await second.lookup("r", NAMES) == [0] * 4


async def test_blocks_that_are_too_large_are_not_written(tmp_path, server):
    config = settings(
        shared={"url": server.url, "max_frame_bytes": 64 << 10}, lookup_ms=1000, codec="raw"
    )
    async with running_agent(config, tmp_path / "a.sock") as agent:
        groups = (GroupLayout(((0, 96 << 10),), "bf16", 64),)
        with SimulatedEngine(tmp_path / "a.sock", groups=groups, chunk_bytes=96 << 10) as engine:
            await engine.connected()
            await engine.store(keys(0), [0])
            shared = agent._context.tiers.shared
            await until(lambda: shared.drops["large"], "the refusal")
            assert not values(server)


async def test_a_server_that_is_full_takes_nothing_and_costs_nothing(tmp_path, server):
    with redis.Redis(port=server.port) as client:
        client.config_set("maxmemory", "1")
        client.config_set("maxmemory-policy", "noeviction")
    async with running_agent(sharing(server), tmp_path / "a.sock") as agent:
        with SimulatedEngine(tmp_path / "a.sock") as engine:
            await engine.connected()
            await engine.store(NAMES, [0, 1, 2, 3])
            shared = agent._context.tiers.shared
            await until(lambda: shared.drops["refused"] == 4, "the refusals")
            assert shared.is_up


async def test_a_server_that_hangs_costs_one_deadline_and_is_used_again_when_it_answers(
    tmp_path, server
):
    config = settings(shared={"url": server.url}, lookup_ms=100)
    async with writer_and_reader(tmp_path, config) as (_, (reader, second)):
        shared = reader._context.tiers.shared
        second.prepare("r")
        await second.lookup("r", keys(50))
        with server.paused():
            assert await second.lookup("r", NAMES) == [0] * 4
            assert not shared.is_up
            failures = shared.failures
            for number in range(20):
                assert await second.lookup("r", keys(60 + number)) == [0]
            assert shared.failures == failures, "it was asked again"
            assert (await get_json(reader, "/healthz"))["shared"] == "down"
        await until(lambda: shared.is_up, "the server to be used again")
        assert await second.lookup("r", NAMES) == [1] * 4


async def test_a_session_that_ends_leaves_nothing_there(tmp_path, server):
    async with (
        running_agent(sharing(server), tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path),
    ):
        shared = agent._context.tiers.shared
        await until(lambda: shared.writes == 4, "the writes")
        await call(agent, "DELETE", ALICE)
        await until(lambda: not values(server), "the end of the blocks")


def test_a_server_elsewhere_is_not_spoken_to_in_the_clear():
    with pytest.raises(ConfigError, match="in the clear"):
        Config.load({"agent": {"shared": {"url": "redis://192.0.2.1:6379/0"}}}, environ={})
    for fine in ("rediss://192.0.2.1:6379/0", "redis://127.0.0.1:6379/0", "redis://localhost"):
        Config.load({"agent": {"shared": {"url": fine}}}, environ={})


async def test_many_lookups_at_once_do_not_disturb_each_other(tmp_path, server):
    async with writer_and_reader(tmp_path, sharing(server)) as (_, (reader, second)):
        for number in range(40):
            second.prepare(f"r{number}")
        found = await asyncio.gather(*(second.lookup(f"r{n}", NAMES) for n in range(40)))
        assert found == [[1] * 4] * 40
        assert reader._context.tiers.shared.is_up
