"""Messages over real sockets, and who receives them."""

import socket
import threading

import pytest

from mcp_vllm.split import channel as channel_module
from mcp_vllm.split import wire
from mcp_vllm.split.channel import Channel, Patience
from mcp_vllm.split.errors import StageLost, WireError
from mcp_vllm.split.inbox import MOST_WAITING, Inbox
from mcp_vllm.split.wire import Acts, Kind
from tests.waiting import wait_for

PATIENCE = Patience(silence_s=10.0, total_s=10.0)


@pytest.fixture
def ends():
    """A socket of the engine's, and the stage's channel."""
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    channel.max_metadata, channel.max_payload = 1 << 10, 1 << 20
    with ours, theirs:
        yield ours, channel


def packed(kind: Kind, payload: bytes = b"", step: int = 0) -> bytes:
    return wire.pack_header(kind, 0, len(payload), step) + payload


def test_messages_that_came_together_are_taken_one_by_one(ends):
    ours, channel = ends
    sizes = [0, 5, 40_000, 100, 0, 70_000, 1]
    sent = b"".join(packed(Kind.ACTS, bytes([i]) * size, i) for i, size in enumerate(sizes))
    writer = threading.Thread(target=ours.sendall, args=(sent,))
    writer.start()
    for number, size in enumerate(sizes):
        message = channel.receive(PATIENCE)
        assert (message.step, message.payload) == (number, bytes([number]) * size)
    assert channel.poll(PATIENCE) is None
    writer.join()


def test_what_came_with_a_message_is_there_without_waiting(ends):
    ours, channel = ends
    ours.sendall(packed(Kind.STEP, step=1) + packed(Kind.STEP, step=2))
    assert channel.receive(PATIENCE).step == 1
    assert channel.poll(PATIENCE).step == 2
    assert channel.poll(PATIENCE) is None


def test_polling_leaves_the_deadline_of_sending_alone(ends):
    _, channel = ends
    channel.send(Kind.OK, patience=Patience(silence_s=7.0))
    assert channel.poll(PATIENCE) is None
    assert channel._socket.gettimeout() == 7.0


def test_a_worker_receives_for_itself(ends):
    ours, channel = ends
    inbox = Inbox(channel)
    taken = []
    worker = threading.Thread(target=lambda: taken.append(inbox.take()))
    worker.start()
    wait_for("the worker to receive", inbox._receiving.locked)
    inbox.look()  # nothing: the worker does
    ours.sendall(packed(Kind.STEP, step=3))
    worker.join(10)
    assert [message.step for message in taken] == [3]


def test_while_the_worker_works_pings_are_answered_and_messages_kept(ends):
    ours, channel = ends
    inbox = Inbox(channel)
    ours.sendall(packed(Kind.STEP, step=1) + packed(Kind.PING) + packed(Kind.STEP, step=2))
    inbox.look()
    header = Channel(ours)._read(wire.HEADER.size, PATIENCE, None)
    assert wire.unpack_header(header, 0, 0).kind == Kind.PONG
    assert [inbox.take().step, inbox.take().step] == [1, 2]


def test_no_more_is_kept_than_so_many_messages(ends):
    ours, channel = ends
    inbox = Inbox(channel)
    ours.sendall(b"".join(packed(Kind.STEP, step=number) for number in range(9)))
    for _ in range(3):
        inbox.look()
        assert len(inbox._waiting) == MOST_WAITING
    assert [inbox.take().step for _ in range(9)] == list(range(9))


def test_a_connection_that_ends_is_noticed_after_what_came_before(ends):
    ours, channel = ends
    inbox = Inbox(channel)
    ours.sendall(packed(Kind.STEP, step=1))
    ours.close()
    inbox.look()
    assert inbox.take().step == 1
    with pytest.raises(StageLost):
        inbox.take()


@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize(
    ("sent", "error"),
    [(packed(Kind.BYE), StageLost), (b"GET / HTTP/1.1\r\nHost: stage\r\n\r\n" * 2, WireError)],
    ids=["good-bye", "garbage"],
)
def test_what_ends_a_lease_is_raised_when_it_is_taken(ends, sent, error, looked):
    ours, channel = ends
    inbox = Inbox(channel)
    ours.sendall(sent)
    if looked:
        inbox.look()
    with pytest.raises(error):
        inbox.take()


def test_an_error_is_taken_although_more_has_begun_to_come(ends):
    ours, channel = ends
    inbox = Inbox(channel)
    ours.sendall(b"\x00" * (wire.HEADER.size + 5))
    for _ in range(3):
        looking = threading.Thread(target=inbox.look)
        looking.start()
        looking.join(10)
        assert not looking.is_alive()
    with pytest.raises(WireError):
        inbox.take()


def test_a_message_is_taken_while_the_next_one_still_comes(ends):
    ours, channel = ends
    inbox = Inbox(channel)
    whole = packed(Kind.ACTS, b"rows", 1)
    ours.sendall(packed(Kind.STEP, step=1) + whole[:-2])
    looking = threading.Thread(target=inbox.look)
    looking.start()
    wait_for("the first message", lambda: len(inbox._waiting))
    assert inbox.take().kind == Kind.STEP
    assert looking.is_alive()
    ours.sendall(whole[-2:])
    looking.join(10)
    assert inbox.take().payload == b"rows"


def test_a_payload_larger_than_allowed_is_not_read(ends):
    ours, channel = ends
    ours.sendall(wire.pack_header(Kind.ACTS, 0, channel.max_payload + 1, 1))
    with pytest.raises(WireError, match="payload of"):
        channel.receive(PATIENCE)


def test_a_message_in_pieces_is_one_message(ends):
    ours, channel = ends
    parts = [memoryview(b"ab"), memoryview(b"cd" * 40_000)]
    writer = threading.Thread(target=Channel(ours).send, args=(Kind.ACTS, Acts([1, 2]), parts, 5))
    writer.start()
    message = channel.receive(PATIENCE)
    writer.join()
    assert wire.decode(Acts, message.metadata).order == [1, 2]
    assert message.payload == b"ab" + b"cd" * 40_000


class Polls:
    """Counts a channel's looks at its socket, in place of its `poll` object."""

    def __init__(self, channel: Channel) -> None:
        self._poll = channel._readable.poll
        self.timeouts: list[float | None] = []
        channel._readable = self

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        self.timeouts.append(timeout)
        return self._poll(timeout)


def test_what_comes_soon_is_waited_for_awake_and_not_for_ever(ends, monkeypatch):
    monkeypatch.setattr(channel_module, "_AWAKE_S", 0.2)
    ours, channel = ends
    channel.shares_cores = True
    polls, received = Polls(channel), []
    receiver = threading.Thread(target=lambda: received.append(channel.receive()))
    receiver.start()
    wait_for("the receiver to sleep", lambda: polls.timeouts == [None])
    ours.sendall(packed(Kind.SOON))
    wait_for("it to sleep again", lambda: len(polls.timeouts) > 1 and polls.timeouts[-1] is None)
    awake = polls.timeouts[1:-1]
    assert awake == [0] * len(awake) != []
    ours.sendall(packed(Kind.REPLY, b"rows", step=4))
    receiver.join(10)
    assert [(each.kind, each.payload) for each in received] == [(Kind.REPLY, b"rows")]


def test_where_cores_are_not_shared_what_comes_soon_is_no_reason_to_stay_awake(ends):
    ours, channel = ends
    polls = Polls(channel)
    ours.sendall(packed(Kind.SOON) + packed(Kind.STEP, step=1))
    assert channel.receive(PATIENCE).step == 1
    receiver = threading.Thread(target=channel.receive)
    receiver.start()
    wait_for("the receiver to sleep", lambda: polls.timeouts == [10_000, None])
    ours.sendall(packed(Kind.STEP, step=2))
    receiver.join(10)
    assert not receiver.is_alive()


def test_looking_for_messages_does_not_wait_for_what_comes_soon(ends):
    ours, channel = ends
    channel.shares_cores = True
    polls = Polls(channel)
    ours.sendall(packed(Kind.SOON))
    assert channel.poll(PATIENCE) is None
    assert polls.timeouts == [0, 0]
