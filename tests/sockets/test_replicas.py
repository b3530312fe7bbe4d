"""Copies of sessions at peers, on whole agents: made after each turn, by what is missing there, and
taken back when the session ends."""

import time
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np
import pytest
import xxhash
from simulated import (
    SimulatedEngine,
    acquainted,
    address,
    key,
    keys,
    metric,
    running_agent,
    settings,
    until,
)
from simulated_sessions import ALICE, CHAINS, NAMES, call, engine_with_session, turn

from mcp_vllm.agent import replicator
from mcp_vllm.agent.chunk_set import hash_keys
from mcp_vllm.agent.directory_wire import session_hash
from mcp_vllm.agent.peer_http import Member
from mcp_vllm.link import protocol
from mcp_vllm.session.manifest import SessionKey

SESSION = SessionKey("default", "alice")


@pytest.fixture(autouse=True)
def _sweeps_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicator, "SWEEP_S", 0.05)


def replicating(config, **how: object):
    section = config.replication.model_copy(update=how)
    return config.model_copy(update={"replication": section})


@asynccontextmanager
async def source_and_peers(folder, num_peers: int, codec: str = "zstd", **how: object):
    """(The agent whose sessions are copied, its peers, which know it by discovery)."""
    async with AsyncExitStack() as stack:
        peers = []
        for number in range(num_peers):
            agent = running_agent(settings(codec=codec), folder / f"peer{number}.sock")
            peers.append(await stack.enter_async_context(agent))
        config = replicating(settings(*map(address, peers), codec=codec), **how)
        source = await stack.enter_async_context(running_agent(config, folder / "a.sock"))
        for peer in peers:
            peer._peers.set_members("test", [Member(address(source))])
        await acquainted(source, *peers)
        yield source, peers


def copy_at(agent):
    return agent._context.sessions.get(SESSION)


def result(agent, what: str) -> float:
    return metric(agent, "mcp_agent_replications_total", result=what)


async def test_each_turn_is_copied_and_only_what_is_new_travels(tmp_path):
    async with (
        source_and_peers(tmp_path, 2, replicas=2) as (source, peers),
        engine_with_session(source, tmp_path) as engine,
    ):
        await until(lambda: all(copy_at(peer) for peer in peers), "the copies")
        assert all(len(peer._context.store) == 4 for peer in peers)
        shown = (await call(peers[0], "GET", ALICE))[1]
        assert (shown["replica"], shown["turns"]) == (True, 1)
        engine.fill(4, 4)
        await engine.store([key(9)], [4])
        await turn(source, engine, chains=[[*CHAINS[0], key(9)], CHAINS[1]])
        await until(lambda: all(copy_at(peer).turns == 2 for peer in peers), "the next ones")
        assert metric(source, "mcp_agent_sent_chunks_total") == 2 * 5
        assert (await call(source, "GET", ALICE))[1]["replica"] is False


async def test_a_deleted_session_leaves_no_copy_behind(tmp_path):
    async with (
        source_and_peers(tmp_path, 1, replicas=1) as (source, [peer]),
        engine_with_session(source, tmp_path),
    ):
        await until(lambda: copy_at(peer), "the copy")
        name = SESSION
        await until(lambda: source._peers.holders_of(name), "the news")
        await call(source, "DELETE", ALICE)
        await until(lambda: copy_at(peer) is None, "the end of the copy")
        assert len(peer._context.store) == 0


async def test_a_session_that_went_on_at_the_copy_is_neither_overwritten_nor_taken_back(tmp_path):
    async with (
        source_and_peers(tmp_path, 1, replicas=1) as (source, [peer]),
        engine_with_session(source, tmp_path) as engine,
    ):
        await until(lambda: copy_at(peer), "the copy")
        with SimulatedEngine(tmp_path / "peer0.sock") as other:
            await other.connected()
            await turn(peer, other)
        await engine.store([key(9)], [4])
        await turn(source, engine, chains=[[*CHAINS[0], key(9)], CHAINS[1]])
        await until(lambda: result(source, "failed"), "the refusal")
        assert copy_at(peer).replica_of == ""
        await call(source, "DELETE", ALICE)
        await until(lambda: not source._context.sessions.get(SESSION), "the end")
        await engine.store(NAMES, [0, 1, 2, 3])
        await turn(source, engine, "another")  # comes after the other in the queue
        await until(
            lambda: peer._context.sessions.get(SessionKey("default", "another")), "the next copy"
        )
        assert copy_at(peer).turns == 2


def first_asked(name: SessionKey, peers):
    """Where copies of that session go first, as the replicator orders peers that have none."""

    def order(peer) -> int:
        which = f"{session_hash(name)} {peer._context.agent_id}".encode()
        return xxhash.xxh3_64_intdigest(which)

    return min(peers, key=order)


async def test_where_one_peer_cannot_the_next_one_keeps_the_copy(tmp_path):
    async with source_and_peers(tmp_path, 2, replicas=1) as (source, peers):
        for peer in peers[:1]:
            peer._context.store.budget_bytes = 1000  # room for nothing
        async with engine_with_session(source, tmp_path) as engine:
            names = [SessionKey("default", f"chat {n}") for n in range(50)]
            names = [name for name in names if first_asked(name, peers) is peers[0]][:2]
            for name in names:
                await turn(source, engine, name.session_id)
            sessions = peers[1]._context.sessions
            await until(lambda: all(map(sessions.get, names)), "the copies")
        assert result(source, "failed") >= len(names) > 0
        assert not any(map(peers[0]._context.sessions.get, names))


async def test_a_copy_that_was_evicted_is_made_anew(tmp_path):
    async with (
        source_and_peers(tmp_path, 1, replicas=1) as (source, [peer]),
        engine_with_session(source, tmp_path),
    ):
        await until(lambda: copy_at(peer), "the copy")
        for name in list(peer._context.store):
            peer._context.store.discard(name)
        await until(lambda: len(peer._context.store) == 4, "the chunks again")


async def test_what_finds_no_room_in_the_queue_is_counted_and_copied_later(tmp_path):
    async with source_and_peers(tmp_path, 1, replicas=1, queue=1) as (source, [peer]):
        async with engine_with_session(source, tmp_path) as engine:
            for number in range(12):
                engine.prepare(f"r{number}", f"chat {number}")
                engine.link.send(protocol.Finish(f"r{number}", list(CHAINS), 48))
            names = [SessionKey("default", f"chat {n}") for n in range(12)]
            await until(lambda: all(map(peer._context.sessions.get, names)), "all copies")
        assert result(source, "dropped") > 0


async def test_copies_are_no_faster_than_they_may_be(tmp_path):
    """A lower bound of time: no busy machine breaks it."""
    num_chunks, chunk_bytes, bytes_s = 16, 16 << 10, 128 << 10
    names = keys(*range(num_chunks))
    async with source_and_peers(tmp_path, 1, "raw", replicas=1, bytes_s=bytes_s) as (source, peers):
        with SimulatedEngine(tmp_path / "a.sock") as engine:
            await engine.connected()
            for number in range(num_chunks):
                rows = engine.rows[number]
                rows[:] = np.random.default_rng(number).integers(0, 256, len(rows))
            await engine.store(names, range(num_chunks))
            begun_s = time.monotonic()
            await turn(source, engine, chains=[names, []])
            await until(lambda: copy_at(peers[0]), "the copy")
        # The last request's bytes are not waited for.
        assert time.monotonic() - begun_s > (num_chunks * chunk_bytes) / bytes_s - 0.6


async def test_nothing_is_copied_unless_that_is_asked_for(tmp_path):
    async with (
        source_and_peers(tmp_path, 1) as (source, [peer]),
        engine_with_session(source, tmp_path),
    ):
        directory = next(iter(peer._peers)).directory
        hashes = hash_keys(NAMES)
        namespace = next(iter(source._context.fingerprints))
        await until(lambda: directory.has_all(namespace, hashes), "the news")
        assert copy_at(peer) is None
        assert metric(source, "mcp_agent_sent_chunks_total") == 0
