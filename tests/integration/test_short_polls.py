"""vLLM's processes sleep soon after a message, and wake for the next one."""

import time
from collections.abc import Iterator

import pytest
import zmq
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.utils.network_utils import get_open_zmq_ipc_path

from mcp_vllm.vllm_plugin.short_polls import POLL_S, RECHECK_MS, VLLM_POLL_S, shorten_polls

LONG_MS = 60_000


class Poller:
    """Notes how long it was to sleep, and does not."""

    def __init__(self) -> None:
        self.asked_ms: list[int] = []

    def poll(self, timeout: int) -> list[tuple[zmq.Socket, int]]:
        self.asked_ms.append(timeout)
        return []


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[SpinCondition]:
    """A reader whose sleeps are noted; what is done to the class is undone."""
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)
    with zmq.Context() as context:
        reader = SpinCondition(True, context, get_open_zmq_ipc_path())
        reader.poller = Poller()
        yield reader
        context.destroy(linger=0)


def slept_ms(reader: SpinCondition, since_read_s: float) -> list[int]:
    reader.poller.asked_ms.clear()
    reader.last_read = time.monotonic() - since_read_s
    reader.wait(timeout_ms=LONG_MS)
    return list(reader.poller.asked_ms)


def test_without_us_a_reader_polls_for_a_second(reader: SpinCondition) -> None:
    assert reader.busy_loop_s == VLLM_POLL_S
    assert slept_ms(reader, POLL_S * 20) == []
    assert slept_ms(reader, VLLM_POLL_S * 2) == [LONG_MS]


def test_with_short_polls_it_soon_sleeps_and_looks_again(reader: SpinCondition) -> None:
    shorten_polls()
    shorten_polls()
    assert slept_ms(reader, -1.0) == []  # has just read
    assert slept_ms(reader, POLL_S * 20) == [RECHECK_MS]
    assert slept_ms(reader, VLLM_POLL_S * 2) == [LONG_MS]
    assert not hasattr(SpinCondition.wait.__wrapped__, "__wrapped__")
