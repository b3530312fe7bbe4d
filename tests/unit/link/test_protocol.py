import contextlib
import socket
import threading

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_vllm.link import protocol
from mcp_vllm.link.protocol import LENGTH, LinkError, body_size, pack, unpack_agent, unpack_engine
from mcp_vllm.link.shared_memory import (
    create_memory,
    map_rows,
    receive_with_fd,
    reopen_read_only,
    send_with_fd,
)

ids = st.integers(-(2**63), 2**63 - 1)
texts, names = st.text(max_size=9), st.lists(st.binary(max_size=40), max_size=5)
ints = st.lists(ids, max_size=5)
groups = st.builds(
    protocol.GroupLayout,
    spans=st.lists(st.tuples(ids, ids), max_size=3).map(tuple),
    element=texts,
    channels=ids,
)
engine_messages = st.one_of(
    st.builds(
        protocol.Hello,
        protocol=ids,
        engine_id=texts,
        pid=ids,
        fingerprint=st.dictionaries(texts, texts, max_size=4),
        chunk_bytes=ids,
        num_chunks=ids,
        groups=st.lists(groups, max_size=3),
    ),
    st.builds(protocol.Prepare, texts, texts, st.none() | texts),
    st.builds(protocol.Lookup, ids, texts, names),
    st.builds(protocol.Load, ids, texts, names),
    st.builds(protocol.Release, ints),
    st.builds(protocol.Store, ids, names, ints),
    st.builds(protocol.Commit, ids),
    st.builds(protocol.Discard, ids),
    st.builds(protocol.Finish, texts, st.lists(names, max_size=3), ids),
)
agent_messages = st.one_of(
    st.builds(protocol.Welcome, texts, ids, ids, ids, ids),
    st.builds(protocol.Refused, texts),
    st.builds(protocol.Found, ids, st.binary(max_size=9)),
    st.builds(protocol.Landed, ids, st.lists(st.tuples(ids, ids), max_size=5)),
    st.builds(protocol.Loaded, ids, ints, ids, ids, st.lists(texts), st.lists(texts)),
    st.builds(protocol.Stored, ids, ids),
)
QUICK = settings(derandomize=True, deadline=None, max_examples=150)


@given(engine_messages)
@QUICK
def test_an_engines_message_arrives_as_it_was_sent(message: protocol.EngineMessage) -> None:
    packed = pack(message)
    assert body_size(packed[: LENGTH.size]) == len(packed) - LENGTH.size
    assert unpack_engine(packed[LENGTH.size :]) == message


@given(agent_messages)
@QUICK
def test_an_agents_message_arrives_as_it_was_sent(message: protocol.AgentMessage) -> None:
    assert unpack_agent(pack(message)[LENGTH.size :]) == message


@given(st.one_of(engine_messages, agent_messages), st.data())
@QUICK
def test_a_damaged_message_raises_link_error_only(message, data: st.DataObject) -> None:
    body = bytearray(pack(message)[LENGTH.size :])
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    del body[data.draw(st.integers(0, len(body))) :]
    for unpack in (unpack_engine, unpack_agent):
        with contextlib.suppress(LinkError):
            unpack(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x82\xa4type\xa6Commit\xa6job_id\xa2\xff\xff",
        b"\x82\xa4type\xa7Refused\xa6reason\xa2\xff\xfe",
        b"\x82\xa1x" + b"\x91" * 100_000,
        msgspec.msgpack.encode({"type": "Stored", "job_id": 1}),
        msgspec.msgpack.encode({"type": "Nonsense"}),
    ],
)
def test_what_is_no_message_raises_link_error(body: bytes) -> None:
    for unpack in (unpack_engine, unpack_agent):
        with pytest.raises(LinkError):
            unpack(body)


def test_a_message_larger_than_any_may_be_is_refused_by_its_length() -> None:
    body_size(LENGTH.pack(protocol.MAX_MESSAGE_BYTES))
    with pytest.raises(LinkError, match="exceeds"):
        body_size(LENGTH.pack(protocol.MAX_MESSAGE_BYTES + 1))


def test_the_group_is_the_end_of_the_key() -> None:
    assert protocol.group_index(b"\xff" * 32 + b"\x00\x00\x01\x02") == 258


def test_memory_passes_through_a_socket_and_the_receiver_cannot_write_it() -> None:
    ours, theirs = socket.socketpair()
    fd = create_memory("test", 4 * 100)
    mapped = map_rows(fd, 4, 100, writable=True)
    mapped.rows[2] = 7
    with ours, theirs:
        send_with_fd(ours, pack(protocol.Commit(5)), reopen_read_only(fd))
        body, received = receive_with_fd(theirs, 5.0)
        assert unpack_engine(body) == protocol.Commit(5)
        assert received is not None
        seen = map_rows(received, 4, 100, writable=False)
        assert seen.rows[2].tolist() == [7] * 100
        mapped.rows[3] = 9
        assert seen.rows[3, 0] == 9, "the same memory, not a copy"
        with pytest.raises(ValueError, match="read-only"):
            seen.rows[0] = 1
        with pytest.raises(PermissionError):
            map_rows(received, 4, 100, writable=True)
        send_with_fd(ours, pack(protocol.Commit(6)), None)
        assert receive_with_fd(theirs, 5.0)[1] is None


@pytest.mark.parametrize(("num_rows", "row_bytes"), [(5, 100), (0, 100), (4, 0), (-4, -100)])
def test_memory_smaller_than_claimed_is_refused(num_rows: int, row_bytes: int) -> None:
    with pytest.raises(LinkError):
        map_rows(create_memory("test", 400), num_rows, row_bytes, writable=False)


@pytest.mark.parametrize("sent", [b"", b"\0\0", LENGTH.pack(10) + b"half"])
def test_a_message_that_ends_early_raises_link_error(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(sent)
        with pytest.raises(LinkError, match="ended"):
            receive_with_fd(theirs, 5.0)


@pytest.mark.parametrize("sent", [b"", b"\0\0", LENGTH.pack(10) + b"half"])
def test_a_message_that_never_ends_raises_link_error_in_time(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(sent)
        with pytest.raises(LinkError):
            receive_with_fd(theirs, 0.05)


def test_a_message_that_trickles_in_ends_at_the_deadline_of_the_whole() -> None:
    ours, theirs = socket.socketpair()
    over = threading.Event()

    def trickle() -> None:
        with contextlib.suppress(OSError):
            ours.sendall(LENGTH.pack(1 << 20))
            while not over.wait(0.01):
                ours.sendall(b"x")

    sender = threading.Thread(target=trickle)
    sender.start()
    with ours, theirs:
        with pytest.raises(LinkError):
            receive_with_fd(theirs, 0.1)
        over.set()
        sender.join()
