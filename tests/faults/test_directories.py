"""Peers' directories over real sockets: what is known without asking, who is dead and how soon that
is known, and announcements of every wrong kind."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from restartable_agent import RestartableAgent, started
from simulated import (
    FIELDS,
    SimulatedEngine,
    SimulatedPeer,
    address,
    announces,
    get_json,
    has_all,
    http_head,
    key,
    keys,
    metric,
    never,
    pattern,
    running_agent,
    send_frame,
    sends_all,
    settings,
    until,
)

from mcp_vllm.agent import directory_link, directory_wire, wire
from mcp_vllm.agent.chunk_set import hash_keys
from mcp_vllm.agent.directory_view import DirectoryView
from mcp_vllm.agent.directory_wire import MAX_HASHES, Beat, Changes, Entries, Slice, Start, Whole
from mcp_vllm.agent.peer import Peer
from mcp_vllm.agent.server import Agent
from mcp_vllm.demo.engines import free_port
from mcp_vllm.session.fingerprint import Fingerprint
from mcp_vllm.store.ram import ChunkKey

NAMES = keys(0, 1, 2, 3)
CHUNK_IDS = [4, 5, 6, 7]
NAMESPACE = Fingerprint(FIELDS).digest
NOTICED_S = 2.0
SLACK_S = 1.5  # what a busy machine may add


def the_peer(agent: Agent) -> Peer:
    (peer,) = agent._peers
    return peer


async def knows(agent: Agent, num_chunks: int) -> None:
    await until(
        lambda: (
            the_peer(agent).following == "synced"
            and the_peer(agent).directory.num_chunks == num_chunks
        ),
        f"a directory of {num_chunks}",
    )


async def store(engine: SimulatedEngine, *numbers: int) -> None:
    for number in numbers:
        engine.fill(number, number)
    assert not (await engine.store(keys(*numbers), numbers)).failed


def lookups(agent: Agent) -> tuple[float, float]:
    """(Answered by a directory, asked over the network)."""
    name = "mcp_agent_peer_lookups_total"
    return metric(agent, name, by="directory"), metric(agent, name, by="network")


@contextlib.asynccontextmanager
async def engine_beside(
    folder: Path, *peers: str, **agent: object
) -> AsyncIterator[tuple[SimulatedEngine, Agent]]:
    path = folder / "here.sock"
    async with running_agent(settings(*peers, **agent), path) as here:
        with SimulatedEngine(path) as engine:
            await engine.connected()
            engine.prepare("r")
            yield engine, here


async def test_what_a_peer_has_is_known_without_asking_it(tmp_path: Path) -> None:
    async with (
        running_agent(settings(codec="raw", ram_bytes=1 << 20), tmp_path / "there.sock") as there,
        engine_beside(tmp_path, address(there)) as (engine, here),
    ):
        with SimulatedEngine(tmp_path / "there.sock", num_chunks=128) as source:
            await source.connected()
            await store(source, 0, 1, 2)
            await knows(here, 3)
            assert await engine.lookup("r", NAMES) == [1, 1, 1, 0]
            assert await engine.lookup("r", [key(1, group=1)]) == [0]
            done = await engine.load("r", NAMES[:3], CHUNK_IDS[:3])
            assert (done.failed, done.sources) == (frozenset(), (address(there),))
            assert engine.payload(CHUNK_IDS[1]) == source.payload(1)
            # Evictions are told too: the store there holds fewer than these.
            for first in range(0, 120, 6):
                await store(source, *range(first, first + 6))
            store_there = there._context.store
            last = ChunkKey(NAMESPACE, key(119))
            await until(lambda: last in store_there, "the last commit")
            held = len(store_there)
            assert held < 120
            hashes = set(hash_keys([name.key for name in store_there]).tolist())
            directory = the_peer(here).directory
            await until(lambda: directory.ranks(NAMESPACE).keys() == hashes, "what is there now")
            wanted = keys(*range(3, 120))
            present = await engine.lookup("r", wanted)
            assert present == [int(any(n.key == k for n in store_there)) for k in wanted]
            assert lookups(here)[0] >= 3
            assert lookups(here)[1] == 0
            (report,) = (await get_json(here, "/v1/peers"))["peers"]
            assert (report["directory"], report["chunks"]) == ("synced", held)
            assert report["latency_ms"] > 0
            metrics = here._context.metrics
            assert f'directory_synced{{peer="{address(there)}"}} 1.0' in metrics.render().decode()


async def test_a_stream_that_ends_in_time_is_resumed_and_not_begun_anew(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(directory_wire, "STREAM_S", 0.2)
    taken = []
    real = DirectoryView.apply
    monkeypatch.setattr(DirectoryView, "apply", lambda v, m: taken.append(m) or real(v, m))
    async with (
        running_agent(settings(), tmp_path / "there.sock") as there,
        engine_beside(tmp_path, address(there)) as (_, here),
    ):
        with SimulatedEngine(tmp_path / "there.sock") as source:
            await source.connected()
            await store(source, 0, 1)
            await until(lambda: sum(isinstance(m, Start) for m in taken) >= 3, "two more streams")
            await store(source, 2)
            await knows(here, 3)
    starts = [message.resumed for message in taken if isinstance(message, Start)]
    assert starts == [False] + [True] * (len(starts) - 1)
    assert not metric(here, "mcp_agent_peer_failures_total", peer=address(there), cause="closed")


async def test_an_agent_recognises_itself_and_one_with_two_addresses(tmp_path: Path) -> None:
    own, other = free_port(), free_port()
    peers = [f"127.0.0.1:{own}", f"127.0.0.1:{other}", f"localhost:{other}"]
    async with (
        running_agent(settings(listen=f"127.0.0.1:{other}"), tmp_path / "there.sock"),
        engine_beside(tmp_path, *peers, listen=f"127.0.0.1:{own}") as (engine, here),
    ):
        await until(lambda: len(list(here._peers)) == 1, "the two that do not count")
        assert the_peer(here).following == "synced"
        assert await engine.lookup("r", NAMES) == [0] * 4
        assert lookups(here)[1] == 0


async def test_more_than_a_hundred_peers_are_followed_at_once(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        peers = [
            await stack.enter_async_context(
                SimulatedPeer(has_all, sends_all, announces(key(number), agent_id=f"{number}"))
            )
            for number in range(120)
        ]
        engine, here = await stack.enter_async_context(
            engine_beside(tmp_path, *(peer.name for peer in peers))
        )
        await until(lambda: {each.following for each in here._peers} == {"synced"}, "all of them")
        assert await engine.lookup("r", keys(0, 119, 120)) == [1, 1, 0]
        done = await engine.load("r", keys(0, 119), [0, 1])
        assert not done.failed
        assert set(done.sources) == {peers[0].name, peers[119].name}


# ---- peers that die -------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=lambda each: each.name)
async def test_a_dead_peer_is_noticed_in_two_seconds_and_costs_a_request_one_lookup(
    tmp_path: Path, signum: signal.Signals, caplog
) -> None:
    there = RestartableAgent(tmp_path, "there", settings())
    lookup_ms = 300
    with started(there):
        async with engine_beside(tmp_path, there.address, lookup_ms=lookup_ms) as (engine, here):
            with SimulatedEngine(there.socket) as source:
                await source.connected()
                await store(source, 0, 1, 2, 3)
                await knows(here, 4)
                died_s = time.monotonic()
                os.kill(there.pid, signum)
                # Not noticed yet: the directory still says that it has them.
                if any(await engine.lookup("r", NAMES)):
                    done = await engine.load("r", NAMES, CHUNK_IDS)
                    assert done.failed == {0, 1, 2, 3}
                assert time.monotonic() - died_s < lookup_ms / 1000 + SLACK_S
                await until(lambda: the_peer(here).is_down, "the death")
                assert time.monotonic() - died_s < NOTICED_S + SLACK_S
                assert metric(here, "mcp_agent_peer_up", peer=there.address) == 0
                (report,) = (await get_json(here, "/v1/peers"))["peers"]
                assert (report["up"], report["directory"]) == (False, "down")
                asked_s = time.monotonic()
                assert await engine.lookup("r", NAMES) == [0] * 4
                assert time.monotonic() - asked_s < lookup_ms / 1000 + SLACK_S
                assert lookups(here)[1] == 0
                if signum is signal.SIGSTOP:
                    there.resume()
                    await knows(here, 4)
                    engine.prepare("again")
                    assert await engine.lookup("again", NAMES) == [1] * 4
                    done = await engine.load("again", NAMES, CHUNK_IDS)
                    assert not done.failed
    said = [r.getMessage() for r in caplog.records if there.address in r.getMessage()]
    assert len(said) <= 3, "once a cause"


async def test_a_peer_that_starts_again_is_followed_anew(tmp_path: Path) -> None:
    port, path = free_port(), tmp_path / "there.sock"
    async with engine_beside(tmp_path, f"127.0.0.1:{port}") as (engine, here):
        lives = []
        for number in (0, 1):
            async with running_agent(settings(listen=f"127.0.0.1:{port}"), path):
                with SimulatedEngine(path) as source:
                    await source.connected()
                    await store(source, number)
                    await knows(here, 1)
                    lives.append(the_peer(here).directory.agent_id)
                    assert await engine.lookup("r", NAMES) == [number == n for n in range(4)]
            await until(lambda: the_peer(here).is_down, "its end")
            assert await engine.lookup("r", NAMES) == [0] * 4
        assert lives[0] != lives[1]


# ---- announcements of every wrong kind ------------------------------------------------------


async def test_who_has_less_than_it_says_costs_a_try_and_is_left_alone(tmp_path: Path) -> None:
    async def lacks_all(asked, writer):
        http_head(writer)
        send_frame(writer, wire.END_INDEX, b"")

    names = keys(*range(12))
    async with (
        SimulatedPeer(has_all, lacks_all, announces(*names, agent_id="liar")) as liar,
        SimulatedPeer(has_all, sends_all, announces(*names, agent_id="good")) as good,
        engine_beside(tmp_path, liar.name, good.name) as (engine, here),
    ):
        await until(lambda: [p.following for p in here._peers] == ["synced"] * 2, "both")
        by_name = {peer.name: peer for peer in here._peers}
        by_name[good.name].plan.meter.note_latency(0.5)  # the liar is the nearest
        for first in (0, 4):
            wanted = names[first : first + 4]
            assert await engine.lookup("r", wanted) == [1] * 4
            done = await engine.load("r", wanted, CHUNK_IDS)
            assert (done.failed, done.sources) == (frozenset(), (good.name,))
            assert engine.payload(CHUNK_IDS[3]) == pattern(first + 3, 24 << 10)[:16384].tobytes()
        assert not by_name[liar.name].breaker.is_closed
        assert await engine.lookup("r", names[8:]) == [1] * 4
        await engine.load("r", names[8:], CHUNK_IDS)
        assert (len(liar.fetched), len(good.fetched)) == (2, 3)
        assert by_name[liar.name].directory.num_chunks == 4, "what it lacked is not believed"
        assert liar.lookups == good.lookups == 0


async def floods_with_changes(writer: asyncio.StreamWriter) -> None:
    for seq in range(1, 1 << 20):
        hashes = [(seq << 40) + n for n in range(MAX_HASHES)]
        packed = b"".join(each.to_bytes(8, "big") for each in hashes)
        writer.write(directory_wire.pack(Changes(seq, [Entries(NAMESPACE, [packed])])))
        await writer.drain()


async def floods_with_beats(writer: asyncio.StreamWriter) -> None:
    beats = directory_wire.pack(Beat(0)) * 5000
    while True:
        writer.write(beats)
        await writer.drain()


@pytest.mark.parametrize("flood", [floods_with_changes, floods_with_beats])
async def test_a_flood_neither_fills_the_memory_nor_holds_up_the_others(
    tmp_path: Path, flood
) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with (
        SimulatedPeer(never, never, announces(*NAMES, agent_id="flood", then=flood)) as flooder,
        SimulatedPeer(has_all, sends_all, announces(*NAMES)) as good,
        engine_beside(
            tmp_path, flooder.name, good.name, directory_bytes=4 << 20, lookup_ms=1000
        ) as (engine, here),
    ):
        by_name = {peer.name: peer for peer in here._peers}
        await until(lambda: by_name[good.name].following == "synced", "the good one")
        by_name[good.name].plan.meter.note_latency(1e-6)
        if flood is floods_with_changes:
            await until(lambda: by_name[flooder.name].following == "asked each time", "the limit")
            assert by_name[flooder.name].directory.weight == 0
        for _ in range(20):
            started_s = time.monotonic()
            assert await engine.lookup("r", NAMES) == [1] * 4
            assert time.monotonic() - started_s < 1 + SLACK_S
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 128 << 10


def sends(*parts: bytes):
    async def directory(writer: asyncio.StreamWriter) -> None:
        http_head(writer)
        for part in parts:
            writer.write(part)
        await writer.drain()
        await asyncio.Event().wait()

    return directory


async def trickles(writer: asyncio.StreamWriter) -> None:
    http_head(writer)
    writer.write(directory_wire.LENGTH.pack(1000))
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def ends_in_a_message(writer: asyncio.StreamWriter) -> None:
    http_head(writer)
    writer.write(directory_wire.pack(Start("x", 0, False))[:-2])


async def says_nothing(writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def refuses(writer: asyncio.StreamWriter) -> None:
    http_head(writer, "403 Forbidden")


START = directory_wire.pack(Start("x", 0, False))
WHOLE = directory_wire.pack(Whole(0, 0))
TOO_MANY = Slice([Entries(NAMESPACE, [bytes(8 * MAX_HASHES + 8)])])
BAD_DIRECTORIES = {
    "a message of a gigabyte": (sends(START, b"\x40\x00\x00\x00"), "oversized"),
    "too many chunks in a message": (sends(START, directory_wire.pack(TOO_MANY)), "oversized"),
    "no message": (sends(START, b"\x00\x00\x00\x04SSH-"), "malformed"),
    "changes without a snapshot": (sends(directory_wire.pack(Changes(1, []))), "malformed"),
    "silence": (sends(START, WHOLE), "timeout"),
    "no answer": (says_nothing, "timeout"),
    "drop by drop": (trickles, "timeout"),
    "cut off in a message": (ends_in_a_message, "closed"),
    "refused": (refuses, "http 403"),
}


@pytest.mark.parametrize("what", BAD_DIRECTORIES)
async def test_a_bad_directory_takes_its_peer_down_and_nothing_else(
    tmp_path: Path, monkeypatch, caplog, what: str
) -> None:
    monkeypatch.setattr(directory_link, "MESSAGE_S", 0.5)
    caplog.set_level(logging.WARNING)
    directory, cause = BAD_DIRECTORIES[what]
    async with (
        SimulatedPeer(has_all, sends_all, directory) as bad,
        SimulatedPeer(has_all, sends_all, announces(*NAMES)) as good,
        engine_beside(tmp_path, bad.name, good.name) as (engine, here),
    ):
        by_name = {peer.name: peer for peer in here._peers}
        await until(lambda: by_name[bad.name].is_down, "the fault")
        await until(lambda: by_name[good.name].following == "synced", "the other")
        assert metric(here, "mcp_agent_peer_failures_total", peer=bad.name, cause=cause) >= 1
        assert await engine.lookup("r", NAMES) == [1] * 4
        done = await engine.load("r", NAMES, CHUNK_IDS)
        assert (done.failed, done.sources) == (frozenset(), (good.name,))
        assert (bad.lookups, bad.fetched) == (0, [])
    said = [r.getMessage() for r in caplog.records if bad.name in r.getMessage()]
    assert len(said) == 1


async def test_a_gap_is_made_up_for_by_a_snapshot_and_the_peer_is_asked_meanwhile(
    tmp_path: Path, caplog
) -> None:
    whole = asyncio.Event()

    async def skips_one(writer: asyncio.StreamWriter) -> None:
        if not whole.is_set():
            writer.write(directory_wire.pack(Changes(2, [])))
            await writer.drain()

    async with (
        SimulatedPeer(has_all, sends_all, announces(*NAMES[:2], then=skips_one)) as peer,
        engine_beside(tmp_path, peer.name) as (engine, here),
    ):
        resyncs = "mcp_agent_directory_resyncs_total"
        await until(lambda: metric(here, resyncs, peer=peer.name, cause="gap") >= 2, "the gaps")
        await until(lambda: the_peer(here).following == "connecting", "the pause")
        assert await engine.lookup("r", NAMES) == [1] * 4
        assert peer.lookups >= 1
        whole.set()
        await knows(here, 2)
        assert await engine.lookup("r", NAMES) == [1, 1, 0, 0]
        assert set(peer.followed) == {("", 0)}
        assert len([r for r in caplog.records if "is of no use" in r.getMessage()]) == 1
        assert not metric(here, "mcp_agent_peer_failures_total", peer=peer.name, cause="gap")
