"""Peers that are found while serving: DNS names and a registry, against real agents and a real
Redis server."""

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis_server import needs_redis, running_redis
from simulated import (
    SimulatedEngine,
    address,
    get_json,
    keys,
    metric,
    running_agent,
    settings,
    until,
)
from simulated_security import SecuredSettings, tls_files

from mcp_vllm.agent.discovery import Discovery
from mcp_vllm.agent.peer_http import Member
from mcp_vllm.agent.registry import MAX_ENTRIES, Registry
from mcp_vllm.agent.server import Agent
from mcp_vllm.config import Config, ConfigError
from mcp_vllm.store.shared import RedisSetupError
from mcp_vllm.telemetry.agent_metrics import AgentMetrics


def discovering(listen: str = "127.0.0.1:0", **discovery: object) -> Config:
    plain = settings(listen=listen).model_dump()
    return Config.model_validate({**plain, "discovery": discovery})


def names(agent: Agent) -> set[str]:
    return {peer.name for peer in agent._peers}


def synced(agent: Agent) -> set[str]:
    return {peer.name for peer in agent._peers if peer.following == "synced"}


class Names:
    """Stands in for the resolver: `addresses` of any name; None is an outage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: list[str] | None = []
        self.asked = 0
        monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", self._resolve)

    async def _resolve(self, host: str, port: int, **how: object):  # type: ignore[no-untyped-def]
        if host != "agents.test":
            infos = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]
            return infos if host[0].isdigit() else []
        self.asked += 1
        if self.addresses is None:
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return [
            (0, socket.SOCK_STREAM, 6, "", (each, port, 0, 0)[: 4 if ":" in each else 2])
            for each in self.addresses
        ]


class Noted:
    """Takes the place of the peers."""

    def __init__(self) -> None:
        self.members: list[Member] | None = None

    def set_members(self, source: str, members: list[Member]) -> None:
        self.members = members


@contextlib.asynccontextmanager
async def discovery_of(config: Config, peers: Noted) -> AsyncIterator[AgentMetrics]:
    metrics = AgentMetrics()
    task = asyncio.create_task(
        Discovery(config, "me", 7077, peers, metrics).run()  # type: ignore[arg-type]
    )
    try:
        yield metrics
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_all_addresses_of_a_name_are_members_and_an_outage_keeps_them(monkeypatch):
    resolver, peers = Names(monkeypatch), Noted()
    resolver.addresses = ["10.0.0.2", "fd00::1", "10.0.0.1", "10.0.0.2"]
    config = discovering(dns=["agents.test:7077"])
    object.__setattr__(config.discovery, "dns_s", 0.005)
    async with discovery_of(config, peers) as metrics:
        await until(lambda: peers.members)
        assert peers.members == [
            Member("10.0.0.1:7077", "agents.test"),
            Member("10.0.0.2:7077", "agents.test"),
            Member("[fd00::1]:7077", "agents.test"),
        ]
        resolver.addresses = None

        def failures() -> float | None:
            name = "mcp_agent_discovery_failures_total"
            return metrics.registry.get_sample_value(name, {"source": "dns"})

        await until(lambda: (failures() or 0) > 2, "the outage")
        assert len(peers.members) == 3
        resolver.addresses = ["10.0.0.9"]
        await until(lambda: peers.members == [Member("10.0.0.9:7077", "agents.test")])


async def test_agents_behind_a_name_find_each_other_and_not_themselves(tmp_path, monkeypatch):
    resolver = Names(monkeypatch)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.2", 0))
        port = reserved.getsockname()[1]
    hosts = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    resolver.addresses = hosts[:2]
    async with contextlib.AsyncExitStack() as stack:

        async def started(host: str) -> Agent:
            config = discovering(f"{host}:{port}", dns=[f"agents.test:{port}"], dns_s=1)
            return await stack.enter_async_context(running_agent(config, tmp_path / host))

        one, two = await started(hosts[0]), await started(hosts[1])
        await until(lambda: synced(one) == {f"{hosts[1]}:{port}"}, "the second")
        await until(lambda: names(two) == synced(two) == {f"{hosts[0]}:{port}"}, "the first")
        assert len(list(one._peers)) == 1, "itself does not count"
        third = await started(hosts[2])
        resolver.addresses = hosts
        await until(lambda: f"{hosts[2]}:{port}" in synced(one), "the one who joined")
        await until(lambda: len(synced(third)) == 2, "what the new one finds")
        resolver.addresses = hosts[1:]
        await until(lambda: names(third) == {f"{hosts[1]}:{port}"}, "the one who left")
        rendered = third._context.metrics.render().decode()
        assert f'peer="{hosts[1]}:{port}"' in rendered
        assert f'peer="{hosts[0]}:{port}"' not in rendered, "series of who has left pile up"


# ---- the registry ---------------------------------------------------------------------------


@needs_redis
async def test_agents_find_each_other_in_a_registry_and_share_what_they_have(tmp_path: Path):
    with running_redis(tmp_path) as server:
        config = discovering(registry=server.url, registry_ttl_s=2)
        async with running_agent(config, tmp_path / "a.sock") as one:
            async with running_agent(config, tmp_path / "b.sock") as two:
                await until(lambda: synced(two) == {address(one)}, "the first")
                await until(lambda: synced(one) == {address(two)}, "the second")
                with (
                    SimulatedEngine(tmp_path / "a.sock") as first,
                    SimulatedEngine(tmp_path / "b.sock") as second,
                ):
                    await first.connected()
                    await second.connected()
                    first.fill(0, 1)
                    await first.store(keys(1), [0])
                    (peer,) = two._peers
                    await until(lambda: peer.directory.num_chunks == 1, "the announcement")
                    second.prepare("r")
                    assert await second.lookup("r", keys(1, 2)) == [1, 0]
                    done = await second.load("r", keys(1), [5])
                    assert (done.failed, done.sources) == (frozenset(), (address(one),))
                (report,) = (await get_json(two, "/v1/peers"))["peers"]
                assert (report["directory"], report["chunks"]) == ("synced", 1)
            await until(lambda: not names(one), "the one who left")


@needs_redis
async def test_an_outage_of_the_registry_keeps_the_members_and_its_return_brings_all_back(
    tmp_path: Path, caplog
):
    caplog.set_level(logging.INFO, "mcp_vllm")
    with running_redis(tmp_path) as server:
        config = discovering(registry=server.url, registry_ttl_s=2)
        async with (
            running_agent(config, tmp_path / "a.sock") as one,
            running_agent(config, tmp_path / "b.sock") as two,
        ):
            await until(lambda: synced(one) == {address(two)}, "the other")
            server.kill()
            failures = "mcp_agent_discovery_failures_total"
            await until(lambda: metric(one, failures, source="registry") >= 3, "the outage")
            assert synced(one) == {address(two)}
            server.start()
            async with running_agent(config, tmp_path / "c.sock") as third:
                everybody = {address(one), address(two), address(third)}
                for each in (one, two, third):
                    others = everybody - {address(each)}
                    await until(lambda each=each, others=others: synced(each) == others, "all")
    lines = [r.getMessage() for r in caplog.records if "discovery by registry" in r.getMessage()]
    # Once an outage and agent, not once a beat; a busy machine may have added a short one.
    assert 2 <= len([line for line in lines if "the members stay" in line]) <= 5
    assert len([line for line in lines if "works again" in line]) >= 2


@needs_redis
async def test_who_does_not_come_back_is_forgotten_and_strange_entries_are_left_out(
    tmp_path: Path, caplog
):
    with running_redis(tmp_path) as server:
        config = discovering(registry=server.url, registry_ttl_s=2, group="blue").discovery
        other = discovering(registry=server.url, registry_ttl_s=2, group="green").discovery
        one, two = Registry(config, "1", "a:1"), Registry(config, "2", "b:2")
        stranger = Registry(other, "3", "c:3")
        await stranger.beat()
        assert await one.beat() == []
        assert await two.beat() == [Member("a:1")]
        later_s = 2e9
        bad = [b"4 no-port", b"5 d:0", b"\xff\xfe e:1", b"6", b"7 " + b"h" * 600 + b":1"]
        await one._client.zadd(one._key, dict.fromkeys(bad, later_s))
        for _ in range(2):
            assert await one.beat() == [Member("b:2")]
        assert caplog.text.count("no agent's") == len(bad)
        many = {b"x%d host%d:1" % (n, n): later_s for n in range(2 * MAX_ENTRIES)}
        await one._client.zadd(one._key, many)
        assert len(await one.beat()) <= MAX_ENTRIES
        await one._client.zremrangebyscore(one._key, later_s, later_s)
        await until_gone(one, Member("b:2"))
        await two.leave()
        await one.leave()
        await stranger.leave()


async def until_gone(registry: Registry, member: Member) -> None:
    async with asyncio.timeout(15):
        while member in await registry.beat():
            pass


@needs_redis
async def test_the_password_comes_from_its_file(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("open sesame\n")
    with running_redis(tmp_path, "open sesame") as server:
        config = discovering(registry=server.url, registry_password_file=secret).discovery
        registry = Registry(config, "1", "a:1")
        assert await registry.beat() == []
        await registry.leave()
        without = Registry(discovering(registry=server.url).discovery, "2", "b:2")
        with pytest.raises(Exception, match="authenticate"):
            await without.beat()
        await without._client.aclose()


def test_a_registry_without_its_client_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    config = discovering(registry="redis://127.0.0.1:1/0").discovery
    with pytest.raises(RedisSetupError, match=r"mcp-vllm\[redis\]"):
        Registry(config, "1", "a:1")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"registry": "http://x/0"}, "is not redis://HOST:PORT/DB"),
        ({"registry": "redis://:secret@x/0"}, "the password goes into a file"),
        ({"registry": "redis://x/0?timeout=1"}, "no options"),
        ({"registry": "redis://x/zero"}, "number of a database"),
        ({"registry": "redis://x:port/0"}, "discovery.registry"),
        ({"dns": ["name"]}, "HOST:PORT"),
        ({"dns": ["name:0"]}, "needs the port"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        Config.load({"discovery": keys}, environ={})


def test_a_registry_needs_an_address_that_others_can_use():
    tree = {"insecure": True, "agent": {"listen": "0.0.0.0:7077"}}
    registry = {"registry": "redis://x/0"}
    with pytest.raises(ConfigError, match=r"discovery\.advertise"):
        Config.load({**tree, "discovery": registry}, environ={})
    advertised = {**registry, "advertise": "10.0.0.1:7077"}
    assert Config.load({**tree, "discovery": advertised}, environ={}).seeks_elsewhere


def test_a_token_for_peers_that_are_not_known_yet_needs_tls():
    tree = {"security": {"own_token_file": "t"}, "discovery": {"dns": ["agents.test:7077"]}}
    with pytest.raises(ConfigError, match="in the clear"):
        Config.load(tree, environ={})


async def test_with_tls_the_addresses_of_a_name_must_bear_its_certificate(tmp_path, monkeypatch):
    resolver = Names(monkeypatch)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.2", 0))
        port = reserved.getsockname()[1]
    resolver.addresses = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    service = tls_files(tmp_path, "agents.test")
    another = tls_files(tmp_path, "other.test")
    async with contextlib.AsyncExitStack() as stack:
        agents = []
        for last, files in ((2, service), (3, service), (4, another)):
            plain = SecuredSettings(tls=files).config(listen=f"127.0.0.{last}:{port}").model_dump()
            found = {"dns": [f"agents.test:{port}"], "dns_s": 1}
            config = Config.model_validate({**plain, "discovery": found})
            started = running_agent(config, tmp_path / f"{last}.sock")
            agents.append(await stack.enter_async_context(started))
        one, two, _ = agents
        await until(lambda: synced(one) == {f"127.0.0.3:{port}"}, "the second")
        await until(lambda: synced(two) == {f"127.0.0.2:{port}"}, "the first")
        stranger = next(each for each in one._peers if each.name == f"127.0.0.4:{port}")
        await until(lambda: stranger.is_down, "the one with another name")
