"""The engine's end of the link against an agent that this test plays itself."""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from simulated import CHUNK_BYTES, GROUPS, SimulatedEngine, key, keys, wait_until

from mcp_vllm.link import protocol
from mcp_vllm.link.client import AgentLink, LinkDeadlines
from mcp_vllm.link.events import JobDone
from mcp_vllm.link.protocol import LENGTH, pack
from mcp_vllm.link.shared_memory import (
    create_memory,
    map_rows,
    receive_with_fd,
    reopen_read_only,
    send_with_fd,
)

SLOT_BYTES, NUM_SLOTS = 16 << 10, 4
QUICK = LinkDeadlines(
    handshake_s=2.0, store_s=0.2, load_grace_s=0.1, reconnect_min_s=0.01, reconnect_max_s=0.05
)


class Agent:
    """The agent's end, one step at a time."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._listener.settimeout(10)
        self.fd = create_memory("landing", NUM_SLOTS * SLOT_BYTES)
        self.slots = map_rows(self.fd, NUM_SLOTS, SLOT_BYTES, writable=True).rows

    def accept(self) -> protocol.Hello:
        """Take a connection and its Hello."""
        self.sock, _ = self._listener.accept()
        body, self.host_fd = receive_with_fd(self.sock, 10)
        hello = protocol.unpack_engine(body)
        assert isinstance(hello, protocol.Hello)
        return hello

    def welcome(self, load_ms: int = 100, slot_bytes: int = SLOT_BYTES) -> "Agent":
        self.accept()
        answer = protocol.Welcome("me", slot_bytes, NUM_SLOTS, 50, load_ms)
        send_with_fd(self.sock, pack(answer), reopen_read_only(self.fd))
        return self

    def serve(self, engine: SimulatedEngine, load_ms: int = 100) -> None:
        """`welcome`; returns when the engine has taken note, so that what it asks comes here."""
        self.welcome(load_ms)
        wait_until(lambda: engine.link.connected, "the link")

    def send(self, message: protocol.AgentMessage) -> None:
        self.sock.sendall(pack(message))

    def receive(self) -> protocol.EngineMessage:
        return protocol.unpack_engine(receive_with_fd(self.sock, 10)[0])

    def expect(self, message: protocol.EngineMessage) -> None:
        assert self.receive() == message

    def close(self) -> None:
        self._listener.close()
        with contextlib.suppress(AttributeError):
            self.sock.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path / "agent.sock")
    yield agent
    agent.close()


@pytest.fixture
def engine(tmp_path: Path, agent: Agent) -> Iterator[SimulatedEngine]:
    with SimulatedEngine(tmp_path / "agent.sock", deadlines=QUICK) as engine:
        yield engine


def ended(engine: SimulatedEngine, job_id: int) -> JobDone:
    found: list[JobDone] = []
    wait_until(lambda: found or found.extend(filter(None, [engine.take(JobDone, job_id)])))
    return found[0]


def test_landed_chunks_enter_their_rows_and_only_their_spans(
    engine: SimulatedEngine, agent: Agent
) -> None:
    agent.serve(engine, load_ms=10_000)
    engine.rows[:] = 0xEE
    names = [key(1), key(2, group=1), key(3)]
    engine.link.load(protocol.Load(1, "r", names), [5, 9, 7])
    agent.expect(protocol.Load(1, "r", names))
    agent.slots[0], agent.slots[3] = 1, 2
    agent.send(protocol.Landed(1, [(1, 3), (0, 0)]))
    agent.expect(protocol.Release([3, 0]))
    agent.send(protocol.Loaded(1, [2], 24 << 10, 100, ["agent", "p:1"], ["gone"]))
    done = ended(engine, 1)
    assert done == JobDone(1, frozenset({2}), 24 << 10, 100, ("agent", "p:1"), ("gone",))
    expected = np.full((32, CHUNK_BYTES), 0xEE, np.uint8)
    expected[5, : 16 << 10] = 1
    expected[9, : 4 << 10] = 2
    expected[9, 8 << 10 : 12 << 10] = 2
    assert (engine.rows == expected).all()


def test_chunks_count_as_failed_unless_they_landed_whatever_the_agent_says(
    engine: SimulatedEngine, agent: Agent
) -> None:
    agent.serve(engine, load_ms=10_000)
    engine.link.load(protocol.Load(1, "r", keys(1, 2)), [0, 1])
    agent.receive()
    agent.send(protocol.Loaded(1, [], 0, 0, [], []))
    assert ended(engine, 1).failed == {0, 1}


def test_a_store_is_committed_when_it_was_stored_in_time(
    engine: SimulatedEngine, agent: Agent
) -> None:
    agent.serve(engine)
    engine.link.send(protocol.Store(4, keys(1, 2), [0, 1]))
    agent.expect(protocol.Store(4, keys(1, 2), [0, 1]))
    agent.send(protocol.Stored(4, 77))
    agent.expect(protocol.Commit(4))
    assert ended(engine, 4) == JobDone(4, frozenset(), raw_bytes=77)


def test_a_store_that_took_too_long_fails_and_is_discarded(
    engine: SimulatedEngine, agent: Agent
) -> None:
    agent.serve(engine)
    engine.link.send(protocol.Store(4, keys(1, 2), [0, 1]))
    agent.receive()
    done = ended(engine, 4)
    assert (done.failed, done.causes) == ({0, 1}, ("agent timeout",))
    agent.send(protocol.Stored(4, 77))
    agent.expect(protocol.Discard(4))
    assert engine.take(JobDone, 4) is None
    assert engine.link.connected


def test_a_chunk_that_lands_after_its_deadline_is_not_written(
    engine: SimulatedEngine, agent: Agent
) -> None:
    agent.serve(engine, load_ms=50)
    engine.link.load(protocol.Load(1, "r", keys(1, 2)), [0, 1])
    agent.receive()
    agent.slots[0], agent.slots[1] = 1, 2
    agent.send(protocol.Landed(1, [(0, 0)]))
    agent.expect(protocol.Release([0]))
    assert ended(engine, 1).failed == {1}
    agent.send(protocol.Landed(1, [(1, 1)]))
    agent.expect(protocol.Release([1]))
    agent.send(protocol.Loaded(1, [], 0, 0, [], []))
    engine.link.send(protocol.Commit(99))
    agent.expect(protocol.Commit(99))
    assert engine.rows[0, 0] == 1
    assert not engine.rows[1].any()
    assert engine.take(JobDone, 1) is None


def test_a_lookups_answer_is_passed_on(engine: SimulatedEngine, agent: Agent) -> None:
    agent.serve(engine)
    assert engine.link.lookup_s == 0.05
    engine.link.send(protocol.Lookup(3, "r", keys(1, 2)))
    agent.receive()
    agent.send(protocol.Found(3, b"\1\0"))
    wait_until(lambda: engine.events or engine.events.extend(engine.link.poll()))
    assert engine.events[0].present == b"\1\0"


def test_all_jobs_fail_at_once_when_the_agent_goes_and_it_is_found_again(
    tmp_path: Path, agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    slow = LinkDeadlines(store_s=60, load_grace_s=60, reconnect_min_s=0.01, reconnect_max_s=0.05)
    with SimulatedEngine(tmp_path / "agent.sock", deadlines=slow) as engine:
        agent.serve(engine)
        engine.link.load(protocol.Load(1, "r", keys(1)), [0])
        engine.link.send(protocol.Store(2, keys(2), [1]))
        agent.receive()
        agent.receive()
        agent.close()
        for job_id in (1, 2):
            assert ended(engine, job_id) == JobDone(job_id, frozenset({0}), causes=("agent",))
        assert not engine.link.connected
        engine.link.send(protocol.Store(3, keys(2), [1]))
        assert ended(engine, 3).causes == ("no agent",)
        os.unlink(tmp_path / "agent.sock")
        back = Agent(tmp_path / "agent.sock").welcome()
        wait_until(lambda: engine.link.connected)
        assert (engine.link.counters.connects, engine.link.counters.disconnects) == (2, 1)
        back.close()
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1


def test_without_any_agent_jobs_fail_at_once_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attempts: list[None] = []
    with SimulatedEngine(
        tmp_path / "nobody.sock", deadlines=QUICK, before_connect=lambda: attempts.append(None)
    ) as engine:
        engine.link.load(protocol.Load(1, "r", keys(1, 2)), [0, 1])
        assert ended(engine, 1) == JobDone(1, frozenset({0, 1}), causes=("no agent",))
        wait_until(lambda: len(attempts) > 5)
    assert len(caplog.records) == 1


def test_an_agent_that_drops_us_at_once_is_not_asked_or_told_of_without_pause(
    engine: SimulatedEngine, agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        agent.welcome()
        agent.sock.close()
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1


@pytest.mark.parametrize(
    "sent",
    [
        pack(protocol.Landed(1, [(0, NUM_SLOTS)])),
        pack(protocol.Landed(1, [(0, -1)])),
        pack(protocol.Landed(1, [(0, 2**40)])),
        pack(protocol.Stored(1, 5)),
        pack(protocol.Loaded(2, [], 0, 0, [], [])),
        pack(protocol.Refused("no more")),
        pack(protocol.Commit(1)),
        LENGTH.pack(protocol.MAX_MESSAGE_BYTES + 1),
        LENGTH.pack(3) + b"\xc1\xc1\xc1",
        LENGTH.pack(100_003) + b"\x82\xa1x" + b"\x91" * 100_000,
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
    ids=range(11),
)
def test_a_hostile_message_ends_the_connection_and_nothing_else(
    engine: SimulatedEngine, agent: Agent, sent: bytes
) -> None:
    agent.serve(engine, load_ms=60_000)
    engine.link.load(protocol.Load(1, "r", keys(1)), [0])
    engine.link.send(protocol.Store(2, keys(1), [0]))
    agent.receive()
    agent.receive()
    agent.sock.sendall(sent)
    assert ended(engine, 1).failed == {0}
    assert ended(engine, 2).failed == {0}
    assert not engine.rows.any()
    agent.serve(engine)


@pytest.mark.parametrize(
    ("answer", "has_fd"),
    [
        (protocol.Welcome("me", 16, NUM_SLOTS, 50, 50), True),
        (protocol.Welcome("me", SLOT_BYTES, 10**9, 50, 50), True),
        (protocol.Welcome("me", SLOT_BYTES, -1, 50, 50), True),
        (protocol.Welcome("me", SLOT_BYTES, NUM_SLOTS, 50, 50), False),
        (protocol.Refused("another protocol"), False),
        (protocol.Stored(1, 1), True),
    ],
)
def test_a_welcome_that_is_none_leaves_us_disconnected_and_trying(
    engine: SimulatedEngine,
    agent: Agent,
    answer: protocol.AgentMessage,
    has_fd: bool,
) -> None:
    agent.accept()
    send_with_fd(agent.sock, pack(answer), reopen_read_only(agent.fd) if has_fd else None)
    agent.serve(engine)
    assert engine.link.counters.connects == 1


def test_jobs_do_not_wait_for_an_agent_that_accepts_and_says_nothing(
    engine: SimulatedEngine, agent: Agent
) -> None:
    agent.accept()
    started_s = time.monotonic()
    engine.link.send(protocol.Store(1, keys(1), [0]))
    assert ended(engine, 1).causes == ("no agent",)
    assert time.monotonic() - started_s < QUICK.handshake_s / 2


def test_an_introduction_that_cannot_be_made_is_tried_again(tmp_path: Path, agent: Agent) -> None:
    failures = [ValueError("weights unreadable"), RuntimeError("still"), KeyError("x")]
    with SimulatedEngine(tmp_path / "agent.sock", deadlines=QUICK) as engine:
        hello = engine.hello
    engine = SimulatedEngine(tmp_path / "agent.sock", deadlines=QUICK)

    def make_hello() -> protocol.Hello:
        if failures:
            raise failures.pop()
        return hello

    engine.link._make_hello = make_hello
    with engine:
        with contextlib.suppress(protocol.LinkError):  # the first engine's connection
            agent.accept()
        wait_until(lambda: not failures)
        agent.serve(engine)


@pytest.mark.parametrize("state", ["never started", "no agent", "silent", "connected", "jobs"])
def test_stop_ends_whatever_the_agent_does(tmp_path: Path, state: str) -> None:
    path = tmp_path / "agent.sock"
    slow = LinkDeadlines(handshake_s=60, store_s=60, reconnect_min_s=60)
    rows = np.zeros((32, CHUNK_BYTES), np.uint8)
    fd = create_memory("host", rows.nbytes)
    hello = protocol.Hello(1, "e", 1, {}, CHUNK_BYTES, 32, list(GROUPS))
    link = AgentLink(str(path), lambda: hello, fd, rows, deadlines=slow)
    agent = Agent(path) if state != "no agent" else None
    if state != "never started":
        link.start()
    if agent is not None and state == "silent":
        agent.accept()
    elif agent is not None and state in ("connected", "jobs"):
        agent.welcome()
        wait_until(lambda: link.connected)
    if state == "jobs":
        link.send(protocol.Store(1, keys(1), [0]))
        assert agent is not None
        agent.receive()
    started_s = time.monotonic()
    link.stop()
    link.stop()
    assert time.monotonic() - started_s < 5
    link.send(protocol.Store(2, keys(1), [0]))
    ended_jobs = {event.job_id for event in link.poll() if isinstance(event, JobDone)}
    assert ended_jobs == ({1, 2} if state == "jobs" else {2})
    if agent is not None:
        agent.close()
    os.close(fd)
