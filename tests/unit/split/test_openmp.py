"""When a thread's OpenMP helpers sleep."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import pytest
import torch

from mcp_vllm.split.engine.openmp import Helpers, team
from tests.unit.split.own_thread import in_thread
from tests.waiting import wait_for

_NUM_THREADS = in_thread(lambda: len(team()))
several_threads = pytest.mark.skipif(_NUM_THREADS < 2, reason="torch computes with one thread")


def waits_at(thread: int) -> int:
    """The address that a thread waits for, its first argument; 0: it runs. See proc(5)."""
    fields = Path(f"/proc/self/task/{thread}/syscall").read_text().split()
    return int(fields[1], 16) if len(fields) > 1 else 0


@several_threads
def test_helpers_sleep_until_they_are_woken() -> None:
    def work() -> tuple[int, bool, int]:
        others = set(team().values()) - {threading.get_native_id()}
        helpers = Helpers.of_this_machine()
        first = ctypes.addressof(helpers._semaphore)
        place = range(first, first + len(helpers._semaphore))

        def all_sleep() -> bool:
            return all(waits_at(each) in place for each in others)

        with helpers.resting():
            wait_for("the helpers sleep", all_sleep)
            helpers.rest()  # they do
            torch.ones(1 << 20).sum()  # which is enough for several threads
            alone_then, still = len(team()), all_sleep()
        helpers.wake()  # they are
        return alone_then, still, len(team())

    assert in_thread(work) == (1, True, _NUM_THREADS)


@several_threads
def test_what_is_prepared_meanwhile_counts_on_all_threads() -> None:
    def work() -> tuple[int, int]:
        helpers = Helpers.of_this_machine()
        with helpers.resting():
            return torch.get_num_threads(), helpers._library.omp_get_max_threads()

    assert in_thread(work) == (_NUM_THREADS, _NUM_THREADS)


@several_threads
def test_an_error_wakes_the_helpers() -> None:
    def work() -> int:
        with pytest.raises(ConnectionError), Helpers.of_this_machine().resting():
            raise ConnectionError
        return len(team())

    assert in_thread(work) == _NUM_THREADS


def test_helpers_that_are_left_alone() -> None:
    def work() -> int:
        with Helpers().resting():
            return len(team())

    assert in_thread(work) == _NUM_THREADS
