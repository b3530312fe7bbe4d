"""Peers that misbehave in every way we could think of: the request never waits longer than the
deadlines say, what was good lands, and the failure is counted and said once."""

import asyncio
import contextlib
import logging
import resource
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zstandard
from simulated import (
    LAYOUT,
    SimulatedEngine,
    SimulatedPeer,
    frame_of,
    good_frame,
    has_all,
    has_all_but,
    http_head,
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
from simulated_sessions import call

from mcp_vllm.agent import wire
from mcp_vllm.agent.server import Agent
from mcp_vllm.codec import Codec, encode_frame
from mcp_vllm.codec.base import Encoded
from mcp_vllm.codec.loss import EXACT
from mcp_vllm.session.archive import ArchivedFrame, ArchiveWriter
from mcp_vllm.session.manifest import Manifest, SessionKey

STALL_MS, LOAD_MS = 200, 1000
SLACK_S = 1.5  # what a busy machine may add; far below what a missing deadline would cost
BOMB_BYTES = 128 << 20
NAMES = keys(0, 1, 2, 3)
CHUNK_IDS = [4, 5, 6, 7]


@contextlib.asynccontextmanager
async def engine_with_peers(
    folder: Path, *names: str, lookup_ms: int = 1000
) -> AsyncIterator[tuple[SimulatedEngine, Agent]]:
    config = settings(*names, lookup_ms=lookup_ms, stall_ms=STALL_MS, load_ms=LOAD_MS)
    path = folder / "agent.sock"
    async with running_agent(config, path) as agent:
        with SimulatedEngine(path) as engine:
            await engine.connected()
            engine.prepare("r")
            yield engine, agent


async def closes_in_mid_stream(asked, writer):
    http_head(writer)
    send_frame(writer, 0, good_frame(asked[0]))
    writer.write(wire.FRAME_HEAD.pack(1, 0, 0, 5000) + b"x" * 100)


async def resets_in_mid_stream(asked, writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    send_frame(writer, 0, good_frame(asked[0]))
    await writer.drain()
    writer.transport.abort()


async def stalls_in_mid_stream(asked, writer):
    http_head(writer)
    send_frame(writer, 0, good_frame(asked[0]))
    await never(asked, writer)


async def sends_a_wrong_checksum(asked, writer):
    http_head(writer)
    for index, name in enumerate(asked):
        frame = good_frame(name)
        if index:
            frame = frame[:-1] + bytes([frame[-1] ^ 1])
        send_frame(writer, index, frame)
    send_frame(writer, wire.END_INDEX, b"")


async def sends_other_chunks(asked, writer):
    http_head(writer)
    send_frame(writer, 0, good_frame(asked[0]))
    for index in range(1, len(asked)):
        send_frame(writer, index, good_frame(asked[0]))
    send_frame(writer, wire.END_INDEX, b"")


async def claims_a_terabyte(asked, writer):
    http_head(writer)
    send_frame(writer, 0, good_frame(asked[0]))
    writer.write(wire.FRAME_HEAD.pack(1, 0, 0, 1 << 40))
    await never(asked, writer)


async def repeats_itself(asked, writer):
    http_head(writer)
    frame = good_frame(asked[0])
    while True:
        send_frame(writer, 0, frame)
        await writer.drain()


async def names_a_key_nobody_asked_for(asked, writer):
    http_head(writer)
    send_frame(writer, 0, good_frame(asked[0]))
    send_frame(writer, 77, b"")


async def claims_a_small_frame_of_a_huge_chunk(asked, writer):
    http_head(writer)
    send_frame(writer, 0, good_frame(asked[0]))
    send_frame(writer, 1, frame_of(asked[1], pattern(1, 64 << 10)))
    send_frame(writer, wire.END_INDEX, b"")


# Here, since it takes a moment that the agent, in this process, would lack.
COMPRESSED_ZEROS = zstandard.ZstdCompressor().compress(bytes(BOMB_BYTES))


class BombCodec(Codec):
    """Says that it is zstd, and makes a part that decompresses to far more than the chunk."""

    name, codec_id, lossless = "zstd", 1, True

    def encode(self, raw, layout):
        return Encoded(self, [COMPRESSED_ZEROS])

    def decode_into(self, parts, out, layout):
        raise AssertionError("only receivers decode it")


def bomb(name: bytes) -> bytes:
    return encode_frame(name, bytes(16 << 10), LAYOUT, BombCodec())


async def sends_a_bomb(asked, writer):
    """A frame of a few KiB, sound by its checksums, whose content would take 256 MiB."""
    http_head(writer)
    send_frame(writer, 0, good_frame(asked[0]))
    for index, name in enumerate(asked[1:], start=1):
        send_frame(writer, index, bomb(name))
    send_frame(writer, wire.END_INDEX, b"")


async def trickles(asked, writer):
    """Never stalls for long enough to notice, and never gets anywhere."""
    http_head(writer)
    send_frame(writer, 0, good_frame(asked[0]))
    writer.write(wire.FRAME_HEAD.pack(1, 0, 0, 10_000))
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def has_lost_everything(asked, writer):
    http_head(writer)
    send_frame(writer, 0, good_frame(asked[0]))
    send_frame(writer, wire.END_INDEX, b"")


BAD_FETCHES = {
    closes_in_mid_stream: "closed",
    resets_in_mid_stream: "closed",
    stalls_in_mid_stream: "timeout",
    sends_a_wrong_checksum: "checksum",
    sends_other_chunks: "malformed",
    claims_a_terabyte: "oversized",
    repeats_itself: "malformed",
    names_a_key_nobody_asked_for: "malformed",
    claims_a_small_frame_of_a_huge_chunk: "malformed",
    sends_a_bomb: "malformed",
    trickles: "timeout",
}


@pytest.mark.parametrize(
    ("fetch", "cause"), BAD_FETCHES.items(), ids=lambda v: getattr(v, "__name__", v)
)
async def test_a_transfer_that_goes_wrong_ends_in_time_and_keeps_what_was_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fetch, cause: str
) -> None:
    caplog.set_level(logging.WARNING)
    async with (
        SimulatedPeer(has_all, fetch) as peer,
        engine_with_peers(tmp_path, peer.name) as (engine, agent),
    ):
        assert await engine.lookup("r", NAMES) == [1, 1, 1, 1]
        started_s = time.monotonic()
        done = await engine.load("r", NAMES, CHUNK_IDS)
        assert time.monotonic() - started_s < LOAD_MS / 1000 + SLACK_S
        assert done.failed == {1, 2, 3}
        assert cause in done.causes
        assert engine.payload(CHUNK_IDS[0]) == pattern(0, 24 << 10)[: 16 << 10].tobytes()
        assert not any(engine.payload(chunk_id).strip(b"\0") for chunk_id in CHUNK_IDS[1:])
        failures = "mcp_agent_peer_failures_total"
        assert metric(agent, failures, peer=peer.name, cause=cause) == 1
        assert sum(
            metric(agent, "mcp_agent_failed_chunks_total", cause=c) for c in done.causes
        ) == 3  # fmt: skip
        # Again: the peer is known to be bad, and that was said.
        engine.prepare("r2")
        if any(await engine.lookup("r2", NAMES[1:])):
            again = await engine.load("r2", NAMES[1:], CHUNK_IDS[1:])
            assert cause in again.causes
        await until(lambda: not next(iter(agent._peers)).breaker.is_closed, "the breaker to open")
        said = [r for r in caplog.records if peer.name in r.getMessage()]
        assert len(said) == 1
        assert cause in said[0].getMessage()


@pytest.mark.parametrize(
    "fetch",
    # The one who trickles uses up the load's time: no other peer gets a turn.
    [*(f for f in BAD_FETCHES if f is not trickles), has_lost_everything],
    ids=lambda fetch: fetch.__name__,
)
async def test_the_next_peer_brings_what_the_first_could_not(tmp_path: Path, fetch) -> None:
    promised, unknown = keys(8, 9)
    async with (
        SimulatedPeer(has_all_but(unknown), fetch) as bad,
        SimulatedPeer(has_all_but(unknown, promised), sends_all) as good,
        engine_with_peers(tmp_path, bad.name, good.name) as (engine, agent),
    ):
        for peer in agent._peers:  # the bad one is the nearest, so it is asked first
            peer.plan.meter.note_latency(0.5 if peer.name == good.name else 0.001)
        assert await engine.lookup("r", [*NAMES, promised, unknown]) == [1, 1, 1, 1, 1, 0]
        done = await engine.load("r", [*NAMES, promised], [*CHUNK_IDS, 9])
        assert done.failed == {4}
        assert set(done.sources) == {bad.name, good.name}
        assert good.fetched == [NAMES[1:]]
        for number, chunk_id in enumerate(CHUNK_IDS):
            assert engine.payload(chunk_id) == pattern(number, 24 << 10)[: 16 << 10].tobytes()


async def answers_garbage(asked, writer):
    writer.write(b"\x00\xffSSH-2.0-nothing of yours\r\n\r\n" * 20)


async def answers_too_few_flags(asked, writer):
    http_head(writer)
    writer.write(wire.encode(wire.LookupReply(b"\x01")))


async def answers_no_message(asked, writer):
    http_head(writer)
    writer.write(b"\x82\xa7present" + b"\x91" * 50_000)


async def answers_without_end(asked, writer):
    http_head(writer)
    while True:
        writer.write(b"\xc4" * 65536)
        await writer.drain()


async def answers_with_an_error(asked, writer):
    http_head(writer, "500 Oops")


async def sends_us_elsewhere(asked, writer):
    writer.write(b"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")


async def closes_at_once(asked, writer):
    return


BAD_LOOKUPS = {
    never: {"timeout"},
    answers_garbage: {"malformed"},
    answers_too_few_flags: {"malformed"},
    answers_no_message: {"malformed"},
    answers_without_end: {"oversized", "timeout"},
    answers_with_an_error: {"http 500"},
    sends_us_elsewhere: {"http 307"},
    closes_at_once: {"closed"},
}


@pytest.mark.parametrize(
    ("lookup", "causes"), BAD_LOOKUPS.items(), ids=lambda v: getattr(v, "__name__", "")
)
async def test_a_lookup_that_goes_wrong_is_a_miss_in_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lookup, causes: set[str]
) -> None:
    caplog.set_level(logging.WARNING)
    lookup_ms = 50 if lookup in (never, answers_without_end) else 1000
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with (
        SimulatedPeer(lookup, never) as peer,
        engine_with_peers(tmp_path, peer.name, lookup_ms=lookup_ms) as (engine, agent),
    ):
        started_s = time.monotonic()
        for _ in range(3):
            assert await engine.lookup("r", NAMES) == [0, 0, 0, 0]
        assert time.monotonic() - started_s < SLACK_S

        def counted() -> float:
            name = "mcp_agent_peer_failures_total"
            return sum(metric(agent, name, peer=peer.name, cause=cause) for cause in causes)

        await until(lambda: counted() >= 2, "the failures to be counted")
        assert peer.lookups == 2, "the breaker was open the third time"
        said = [r for r in caplog.records if peer.name in r.getMessage()]
        assert len(said) <= len(causes)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 96 << 10


async def test_a_peer_that_refuses_is_a_miss_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as reserved:  # bound and not listening
        reserved.bind(("127.0.0.1", 0))
        name = f"127.0.0.1:{reserved.getsockname()[1]}"
        async with engine_with_peers(tmp_path, name) as (engine, agent):
            for _ in range(3):
                assert await engine.lookup("r", NAMES) == [0, 0, 0, 0]
            assert metric(agent, "mcp_agent_peer_failures_total", peer=name, cause="connect") >= 1
            assert next(iter(agent._peers)).is_down
            assert metric(agent, "mcp_agent_peer_up", peer=name) == 0
    assert len([r for r in caplog.records if name in r.getMessage()]) == 1


async def test_an_archive_full_of_bombs_is_refused_and_costs_no_memory(tmp_path: Path) -> None:
    namespace, owner = b"n" * 16, SessionKey("default", "alice")
    manifest = Manifest(
        key=owner, namespace=namespace, chains=[NAMES], num_tokens=64, turns=1, created_s=0.0,
        last_used_s=0.0,
    )  # fmt: skip
    writer = ArchiveWriter()
    pieces = [writer.start(manifest)]
    for name in NAMES:
        pieces += writer.add(ArchivedFrame(bomb(name), EXACT))
    archive = b"".join([*pieces, writer.end()])
    assert len(archive) < 64 << 10
    async with running_agent(settings(), tmp_path / "agent.sock") as agent:
        assert (await call(agent, "GET", "/v1/sessions"))[0] == 200
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status, answer = await call(agent, "POST", "/v1/sessions/import", data=archive)
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
        assert (status, grown_kib < BOMB_BYTES >> 11) == (400, True), answer
        assert len(agent._context.store) == 0


async def test_a_silent_peer_does_not_hide_what_another_has(tmp_path: Path) -> None:
    async with (
        SimulatedPeer(never, never) as silent,
        SimulatedPeer(has_all, sends_all) as good,
        engine_with_peers(tmp_path, silent.name, good.name, lookup_ms=8000) as (engine, _),
    ):
        started_s = time.monotonic()
        assert await engine.lookup("r", NAMES) == [1, 1, 1, 1]
        assert time.monotonic() - started_s < 4, "waited for the silent peer"
        done = await engine.load("r", NAMES, CHUNK_IDS)
        assert (done.failed, done.sources) == (frozenset(), (good.name,))


async def test_a_peer_that_works_again_is_asked_again_and_its_return_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mcp_vllm")
    healthy = asyncio.Event()

    async def fetch(asked, writer):
        await (sends_all if healthy.is_set() else closes_in_mid_stream)(asked, writer)

    async with (
        SimulatedPeer(has_all, fetch) as peer,
        engine_with_peers(tmp_path, peer.name) as (engine, agent),
    ):
        assert await engine.lookup("r", NAMES) == [1, 1, 1, 1]
        assert (await engine.load("r", NAMES, CHUNK_IDS)).failed == {1, 2, 3}
        assert await engine.lookup("r", NAMES) == [1, 1, 1, 1]
        assert not [r for r in caplog.records if "works again" in r.getMessage()]
        healthy.set()
        assert not (await engine.load("r", NAMES, CHUNK_IDS)).failed
        assert [r for r in caplog.records if "works again" in r.getMessage()]
        assert next(iter(agent._peers)).breaker.is_closed
