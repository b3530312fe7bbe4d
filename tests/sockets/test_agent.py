"""Whole agents on real sockets, with engines simulated by their end of the link."""

import asyncio
import contextlib
import logging
import socket
import time
from pathlib import Path

import aiohttp
import pytest
from simulated import (
    CHUNK_BYTES,
    FIELDS,
    SimulatedEngine,
    SimulatedPeer,
    address,
    get,
    get_json,
    has_all,
    key,
    keys,
    metric,
    running_agent,
    sends_all,
    settings,
    until,
)

from mcp_vllm.agent import wire
from mcp_vllm.agent.server import Agent, AgentError
from mcp_vllm.link import protocol
from mcp_vllm.link.protocol import LENGTH, GroupLayout, pack
from mcp_vllm.link.shared_memory import create_memory, receive_with_fd, send_with_fd

NAMES = [*keys(0, 1, 2), key(0, group=1)]
GROUP_OF = [0, 0, 0, 1]


async def fill_and_store(engine: SimulatedEngine) -> None:
    for chunk_id in range(4):
        engine.fill(chunk_id, chunk_id)
    assert not (await engine.store(NAMES, [0, 1, 2, 3])).failed


async def committed(agent: Agent, num_chunks: int = 4) -> None:
    await until(lambda: len(agent._context.store) == num_chunks, "the commit")


async def test_what_was_stored_is_loaded_back_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    async with running_agent(settings(), path) as agent:
        with SimulatedEngine(path) as engine:
            await engine.connected()
            engine.prepare("r", "alice")
            assert await engine.lookup("r", NAMES) == [0, 0, 0, 0]
            await fill_and_store(engine)
            await committed(agent)
            store = agent._context.store
            assert await engine.lookup("r", [*NAMES, key(7)]) == [1, 1, 1, 1, 0]
            for encoded in (False, True):
                engine.rows[8:12] = 0
                done = await engine.load("r", NAMES, [8, 9, 10, 11])
                assert (done.failed, done.sources, done.wire_bytes) == (frozenset(), ("agent",), 0)
                for chunk_id, group in enumerate(GROUP_OF):
                    assert engine.payload(8 + chunk_id, group) == engine.payload(chunk_id, group)
                assert not engine.rows[11, 4 << 10 : 8 << 10].any(), "between the spans"
                if not encoded:
                    engine.link.send(protocol.Finish("r", [NAMES[:3], NAMES[3:]], 48))
                    await until(lambda: not store.size().raw_held_bytes, "the encoder")
            assert store.size().held_bytes < done.raw_bytes
            store.check_integrity()


async def test_a_finished_request_with_a_session_is_a_turn_and_others_are_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.sock"
    async with running_agent(settings(), path) as agent:
        with SimulatedEngine(path) as engine:
            await engine.connected()
            await fill_and_store(engine)
            for request_id, session_id in (("1", "alice"), ("2", "alice"), ("3", None)):
                engine.prepare(request_id, session_id)
                chains = [NAMES[:3], NAMES[3:]]
                engine.link.send(protocol.Finish(request_id, chains, 48))
            engine.prepare("4", "cancelled")
            engine.link.send(protocol.Finish("4", [], 0))
            engine.link.send(protocol.Finish("never prepared", [NAMES], 1))
            await engine.lookup("x", NAMES)
            (session,) = (await get_json(agent, "/v1/sessions"))["sessions"]
            assert (session["session_id"], session["turns"]) == ("alice", 2)
            assert (session["num_chunks"], session["num_tokens"]) == (4, 48)
            detail = await get_json(agent, "/v1/sessions/default/alice")
            assert (detail["held_chunks"], detail["raw_bytes"]) == (4, 3 * (16 << 10) + (8 << 10))
            assert (await get(agent, "/v1/sessions/default/nobody"))[0] == 404


async def test_health_and_metrics_say_what_is_held(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    async with running_agent(settings(), path) as agent:
        with SimulatedEngine(path) as engine:
            await engine.connected()
            await fill_and_store(engine)
            await committed(agent)
            health = await get_json(agent, "/healthz")
            assert (health["status"], health["engines"], health["chunks"]) == ("ok", 1, 4)
            status, text = await get(agent, "/metrics")
            assert status == 200
            assert "mcp_agent_stored_chunks_total 4.0" in text
            assert "mcp_agent_engines 1.0" in text
        await until(lambda: metric(agent, "mcp_agent_engines") == 0, "the engine to leave")
        assert agent._context.activity.busy_requests == 0


async def test_what_one_engine_stored_another_host_loads_over_the_network(tmp_path: Path) -> None:
    one, two = tmp_path / "1.sock", tmp_path / "2.sock"
    async with (
        running_agent(settings(), one) as holder,
        running_agent(settings(address(holder)), two) as asker,
    ):
        with SimulatedEngine(one) as first, SimulatedEngine(two) as second:
            await first.connected()
            await second.connected()
            await fill_and_store(first)
            await committed(holder)
            second.prepare("r", "alice")
            assert await second.lookup("r", NAMES) == [1, 1, 1, 1]
            done = await second.load("r", NAMES, [8, 9, 10, 11])
            assert (done.failed, done.sources) == (frozenset(), (address(holder),))
            for chunk_id, group in enumerate(GROUP_OF):
                assert second.payload(8 + chunk_id, group) == first.payload(chunk_id, group)
            assert 0 < done.wire_bytes < 0.9 * done.raw_bytes
            sent = metric(holder, "mcp_agent_wire_sent_bytes_total")
            received = metric(
                asker, "mcp_agent_wire_received_bytes_total", peer=address(holder)
            )  # fmt: skip
            assert sent == received >= done.wire_bytes
            again = await second.load("r", NAMES, [12, 13, 14, 15])
            assert (again.sources, again.wire_bytes) == (("agent",), 0)
            assert metric(holder, "mcp_agent_sent_chunks_total") == 4


async def test_only_what_is_missing_travels_and_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    async with (
        SimulatedPeer(has_all, sends_all) as peer,
        running_agent(settings(peer.name), path) as agent,
    ):
        with SimulatedEngine(path) as engine:
            await engine.connected()
            for number in (1, 3):
                engine.fill(number, number)
            await engine.store(keys(1, 3), [1, 3])
            await committed(agent, 2)
            engine.prepare("r")
            wanted = keys(0, 1, 2, 3, 4)
            assert await engine.lookup("r", wanted) == [1] * 5
            done = await engine.load("r", wanted, [10, 11, 12, 13, 14])
            assert not done.failed
            assert peer.fetched == [keys(0, 2, 4)]
            assert set(done.sources) == {"agent", peer.name}
            for number in (1, 3):
                assert engine.payload(10 + number) == engine.payload(number)


async def start_loads(
    engine: SimulatedEngine, peer: SimulatedPeer, *wanted: list[bytes]
) -> list[asyncio.Task]:
    """A load of each, into chunks 10, 11, ..., then 20, ...; the first has asked the peer."""
    loads = []
    for number, names in enumerate(wanted):
        engine.prepare(f"r{number}")
        assert await engine.lookup(f"r{number}", names) == [1] * len(names)
        chunk_ids = [10 * (number + 1) + index for index in range(len(names))]
        loads.append(asyncio.create_task(engine.load(f"r{number}", names, chunk_ids)))
        await until(lambda: peer.fetched, "the first load to ask")
    return loads


async def test_two_loads_at_once_fetch_each_chunk_once(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    both_wait = asyncio.Event()

    async def sends_when_both_wait(asked: list[bytes], writer: asyncio.StreamWriter) -> None:
        await both_wait.wait()
        await sends_all(asked, writer)

    async with (
        SimulatedPeer(has_all, sends_when_both_wait) as peer,
        running_agent(settings(peer.name), path),
    ):
        with SimulatedEngine(path) as engine:
            await engine.connected()
            loads = await start_loads(engine, peer, keys(0, 1, 2), keys(1, 2, 3))
            await until(lambda: len(peer.fetched) == 2, "the second load to ask for the rest")
            both_wait.set()
            first, second = [await load for load in loads]
            assert not first.failed | second.failed
            assert peer.fetched == [keys(0, 1, 2), keys(3)]
            assert set(second.sources) == {peer.name, "agent"}
            assert [engine.payload(11), engine.payload(12)] == [
                engine.payload(20),
                engine.payload(21),
            ]


async def test_what_a_failed_load_did_not_bring_is_fetched_by_the_other(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    asked_twice = asyncio.Event()

    async def breaks_once(asked: list[bytes], writer: asyncio.StreamWriter) -> None:
        if len(peer.fetched) == 1:
            await asked_twice.wait()
            writer.close()
        else:
            await sends_all(asked, writer)

    async with (
        SimulatedPeer(has_all, breaks_once) as peer,
        running_agent(settings(peer.name), path),
    ):
        with SimulatedEngine(path) as engine:
            await engine.connected()
            loads = await start_loads(engine, peer, keys(0, 1), keys(0, 1))
            asked_twice.set()
            first, second = [await load for load in loads]
            assert first.failed == {0, 1}
            assert not second.failed
            assert peer.fetched == [keys(0, 1), keys(0, 1)]


async def test_engines_that_differ_exchange_nothing_and_the_log_names_the_field(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = tmp_path / "1.sock", tmp_path / "2.sock"
    async with (
        running_agent(settings(), one) as holder,
        running_agent(settings(address(holder)), two) as asker,
    ):
        other = {**FIELDS, "dtype": "fp16"}
        with SimulatedEngine(one) as first, SimulatedEngine(two, fields=other) as second:
            await first.connected()
            await second.connected()
            await fill_and_store(first)
            await committed(holder)
            second.prepare("r")
            for _ in range(3):
                assert await second.lookup("r", NAMES) == [0, 0, 0, 0]
            done = await second.load("r", NAMES, [8, 9, 10, 11])
            assert done.failed == {0, 1, 2, 3}
            assert metric(holder, "mcp_agent_sent_chunks_total") == 0
            mismatches = "mcp_agent_fingerprint_mismatches_total"
            assert metric(asker, mismatches, peer=address(holder), field="dtype") == 3
        # The same agent, another engine: the store itself keeps them apart.
        with SimulatedEngine(one, fields=other) as stranger:
            await stranger.connected()
            assert await stranger.lookup("r", NAMES) == [0, 0, 0, 0]
    (said,) = [r.getMessage() for r in caplog.records if "cannot exchange" in r.getMessage()]
    assert "dtype: ours is 'fp16', theirs is 'bf16'" in said


async def test_a_store_without_commit_is_seen_by_nobody(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    async with running_agent(settings(), path) as agent:
        with engine_socket(path) as sock:
            await shake_hands(sock)
            await tell(sock, protocol.Store(1, NAMES, [0, 1, 2, 3]))
            assert isinstance(await answer(sock), protocol.Stored)
            await tell(sock, protocol.Lookup(1, "r", NAMES))
            assert await answer(sock) == protocol.Found(1, bytes(4))
            await tell(sock, protocol.Discard(1))
            await tell(sock, protocol.Commit(1))
            await tell(sock, protocol.Lookup(2, "r", NAMES))
            assert await answer(sock) == protocol.Found(2, bytes(4))
            assert len(agent._context.store) == 0


async def test_an_engine_that_leaves_in_the_middle_of_a_load_leaves_nothing_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.sock"
    many = keys(*range(200))
    async with (
        SimulatedPeer(has_all, sends_all) as peer,
        running_agent(settings(peer.name), path) as agent,
    ):
        with engine_socket(path) as sock:
            await shake_hands(sock)
            await tell(sock, protocol.Prepare("r", "default", "s"))
            await tell(sock, protocol.Lookup(1, "r", many))
            assert await answer(sock) == protocol.Found(1, b"\1" * 200)
            await tell(sock, protocol.Load(2, "r", many))
            assert isinstance(await answer(sock), protocol.Landed)
        await until(lambda: metric(agent, "mcp_agent_engines") == 0, "the agent to notice")
        assert agent._context.activity.busy_requests == 0
        with SimulatedEngine(path) as engine:
            await engine.connected()
            await engine.lookup("r", NAMES)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


# ---- hostile engines ------------------------------------------------------------------------


def engine_socket(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    return sock


def hello(**changes: object) -> protocol.Hello:
    fields = {
        "protocol": protocol.PROTOCOL_VERSION,
        "engine_id": "hostile",
        "pid": 1,
        "fingerprint": FIELDS,
        "chunk_bytes": CHUNK_BYTES,
        "num_chunks": 8,
        "groups": [GroupLayout(((0, 16 << 10),), "bf16", 64)] * 2,
    }
    return protocol.Hello(**{**fields, **changes})  # type: ignore[arg-type]


async def tell(sock: socket.socket, message: protocol.EngineMessage) -> None:
    await asyncio.to_thread(sock.sendall, pack(message))


async def answer(sock: socket.socket) -> protocol.AgentMessage:
    body, _ = await asyncio.to_thread(receive_with_fd, sock, 10.0)
    return protocol.unpack_agent(body)


async def shake_hands(
    sock: socket.socket, introduction: protocol.Hello | None = None, size: int = 8 * CHUNK_BYTES
) -> protocol.AgentMessage:
    packed = pack(introduction or hello())
    await asyncio.to_thread(send_with_fd, sock, packed, create_memory("host", size))
    return await answer(sock)


async def still_serves(path: Path) -> None:
    with SimulatedEngine(path) as engine:
        await engine.connected()
        assert await engine.lookup("r", NAMES) == [0, 0, 0, 0]


REFUSED = {
    "another protocol": (hello(protocol=1), "protocol 2"),
    "no group": (hello(groups=[]), "group"),
    "a span beyond the chunk": (
        hello(groups=[GroupLayout(((0, CHUNK_BYTES + 1),), "bf16", 64)]),
        "span",
    ),
    "a negative span": (hello(groups=[GroupLayout(((-8, 16),), "bf16", 64)]), "span"),
    "spans that overlap": (hello(groups=[GroupLayout(((0, 9), (8, 9)), "bf16", 64)]), "span"),
    "an unknown element": (hello(groups=[GroupLayout(((0, 8),), "f128", 64)]), "f128"),
    "no channels": (hello(groups=[GroupLayout(((0, 8),), "bf16", 0)]), "channels"),
    "more chunks than memory": (hello(num_chunks=9), "hold"),
    "no chunks": (hello(num_chunks=0), "hold"),
    "impossible sizes": (hello(num_chunks=2**62, chunk_bytes=2**62), "hold"),
    "a fingerprint without end": (hello(fingerprint={str(i): "" for i in range(99)}), "sane"),
    "a field without end": (hello(fingerprint={"model": "x" * 100_000}), "model"),
}


async def test_an_engine_that_cannot_be_served_is_told_why(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    async with running_agent(settings(), path):
        for what, (introduction, reason) in REFUSED.items():
            with engine_socket(path) as sock:
                refused = await shake_hands(sock, introduction)
                assert isinstance(refused, protocol.Refused), what
                assert reason in refused.reason
        await still_serves(path)


async def test_garbage_on_the_engine_socket_ends_that_connection_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.sock"
    async with running_agent(settings(), path):
        for sent in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            LENGTH.pack(protocol.MAX_MESSAGE_BYTES + 1),
            LENGTH.pack(4) + b"\xc1\xc1\xc1\xc1",
            LENGTH.pack(100_003) + b"\x82\xa1x" + b"\x91" * 100_000,
            pack(protocol.Commit(1)),
            pack(hello()),  # without its memory
        ):
            with engine_socket(path) as sock:
                sock.sendall(sent)
                sock.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    assert not await asyncio.to_thread(sock.recv, 1)
        silent = [engine_socket(path) for _ in range(3)]
        await still_serves(path)
        for sock in silent:
            sock.close()
    assert len([r for r in caplog.records if "refused" in r.getMessage()]) >= 7


@pytest.mark.parametrize(
    "message",
    [
        protocol.Store(1, keys(1), [8]),
        protocol.Store(1, keys(1), [-1]),
        protocol.Store(1, keys(1), [2**40]),
        protocol.Store(1, keys(1, 2), [0]),
        protocol.Store(1, [key(1, group=2)], [0]),
        protocol.Load(1, "r", [key(1, group=99)]),
        protocol.Load(1, "r", [b""]),
        protocol.Lookup(1, "r", [b"k" * (protocol.MAX_KEY_BYTES + 1)]),
        protocol.Release([0]),
        protocol.Release([-1]),
        hello(),
    ],
    ids=lambda message: type(message).__name__,
)
async def test_an_engine_that_breaks_the_protocol_is_disconnected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, message: protocol.EngineMessage
) -> None:
    path = tmp_path / "a.sock"
    async with running_agent(settings(), path):
        with engine_socket(path) as sock:
            assert isinstance(await shake_hands(sock), protocol.Welcome)
            await tell(sock, message)
            assert not await asyncio.to_thread(sock.recv, 1)
        await still_serves(path)
    assert len([r for r in caplog.records if "broke the protocol" in r.getMessage()]) == 1


async def test_a_peers_request_that_breaks_the_protocol_is_refused(tmp_path: Path) -> None:
    async with (
        running_agent(settings(), tmp_path / "a.sock") as agent,
        aiohttp.ClientSession() as http,
    ):
        url = f"http://{address(agent)}/v1/blocks/"
        good = wire.LookupRequest(wire.WIRE_VERSION, b"n", keys(1))
        for body, status in (
            (wire.encode(good), 200),
            (wire.encode(wire.LookupRequest(9, b"n", keys(1))), 409),
            (wire.encode(wire.LookupRequest(wire.WIRE_VERSION, b"n", [b""])), 400),
            (wire.encode(wire.LookupRequest(wire.WIRE_VERSION, b"n", [b"k" * 129])), 400),
            (b"\x82\xa1x" + b"\x91" * 100_000, 400),
            (b"", 400),
            (bytes(wire.MAX_REQUEST_BYTES + 1), 413),
        ):
            for path in ("lookup", "fetch"):
                async with http.post(url + path, data=body) as response:
                    assert response.status == status
        body = wire.encode(wire.FetchRequest(wire.WIRE_VERSION, b"unknown", keys(1, 2)))
        async with http.post(url + "fetch", data=body) as response:
            assert await response.read() == wire.FRAME_HEAD.pack(wire.END_INDEX, 0, 0, 0)


async def test_an_agent_does_not_remove_what_is_not_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("mine")
    with pytest.raises(AgentError, match="no socket"):
        async with running_agent(settings(), path):
            pass
    assert path.read_text() == "mine"


async def test_a_second_agent_at_one_socket_is_refused_and_a_dead_ones_socket_is_taken_over(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with running_agent(settings(), path):
        with pytest.raises(AgentError, match="another agent"):
            async with running_agent(settings(), path):
                pass
        await still_serves(path)
    assert not path.exists()


async def test_an_agent_ends_soon_although_a_peer_does_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    async with running_agent(settings(codec="raw"), path) as agent:
        with SimulatedEngine(path, num_chunks=600) as engine:
            await engine.connected()
            names = keys(*range(600))
            assert not (await engine.store(names, range(600))).failed
            await committed(agent, 600)
            (namespace,) = agent._context.fingerprints
            body = wire.encode(wire.FetchRequest(wire.WIRE_VERSION, namespace, names))
            head = f"POST /v1/blocks/fetch HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
            reader, writer = await asyncio.open_connection("127.0.0.1", agent.port)
            writer.write(head.encode() + b"\r\n\r\n" + body)
            await reader.readexactly(100)
        started_s = time.monotonic()
    assert time.monotonic() - started_s < 10
    writer.close()
