"""vLLM's processes sleep soon after a message, and wake for the next one."""

import threading
import time
from collections.abc import Iterator

import pytest
import zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.utils.network_utils import get_open_zmq_ipc_path

from mcp_vllm.vllm_plugin.short_polls import POLL_S, shorten_polls

VLLM_POLL_S = 1


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SpinCondition, SpinCondition]]:
    """A writer and a reader that has just read; what is done to the class is undone."""
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)
    address = get_open_zmq_ipc_path()
    with zmq.Context() as context:
        writer = SpinCondition(is_reader=False, context=context, notify_address=address)
        reader = SpinCondition(is_reader=True, context=context, notify_address=address)
        # A subscription takes a moment to reach the writer.
        deadline_s = time.monotonic() + 10
        while not reader.poller.poll(10) and time.monotonic() < deadline_s:
            writer.notify()
        while reader.poller.poll(100):
            reader.local_notify_socket.recv()
        yield writer, reader
        context.destroy(linger=0)


def test_a_reader_polls_as_long_as_vllm_says(ends) -> None:
    _, reader = ends
    assert reader.busy_loop_s == VLLM_POLL_S
    reader.last_read = time.monotonic()
    started_s = time.monotonic()
    reader.wait(timeout_ms=60_000)
    assert time.monotonic() - started_s < 30  # it did not sleep


def test_with_short_polls_it_sleeps_until_the_next_message(ends) -> None:
    writer, reader = ends
    shorten_polls()
    shorten_polls()
    reader.last_read = time.monotonic() - 2 * POLL_S
    asleep = threading.Thread(target=reader.wait, args=(60_000,))
    asleep.start()
    asleep.join(0.2)
    assert asleep.is_alive()
    writer.notify()
    asleep.join(30)
    assert not asleep.is_alive()
    assert reader.busy_loop_s == POLL_S
    assert not hasattr(SpinCondition.wait.__wrapped__, "__wrapped__")
