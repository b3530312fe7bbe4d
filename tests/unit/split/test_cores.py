"""Which core each OpenMP thread has."""

from __future__ import annotations

import os

import pytest
import torch

from mcp_vllm.split.engine.cores import take_cores
from mcp_vllm.split.engine.openmp import alone, team
from tests.unit.split.own_thread import in_thread

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
pytestmark = pytest.mark.skipif(len(CORES) != 2, reason="binds where there are two cores")


def cores_of_team() -> dict[int, list[int]]:
    return {number: sorted(os.sched_getaffinity(thread)) for number, thread in team().items()}


@pytest.fixture
def as_many_threads_as_cores() -> None:
    if in_thread(lambda: len(team())) != len(CORES):
        pytest.skip(f"torch computes with {torch.get_num_threads()} threads on {len(CORES)} cores")


@pytest.mark.usefixtures("as_many_threads_as_cores")
@pytest.mark.parametrize("from_last", [False, True])
def test_each_thread_has_a_core(from_last: bool) -> None:
    def work() -> tuple[dict[int, list[int]], list[int]]:
        with take_cores(from_last=from_last):
            bound = cores_of_team()
        return bound, sorted(os.sched_getaffinity(0))

    order = CORES[::-1] if from_last else CORES
    assert in_thread(work) == ({number: [core] for number, core in enumerate(order)}, CORES)


@pytest.mark.usefixtures("as_many_threads_as_cores")
def test_binding_twice_changes_nothing() -> None:
    def work() -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        with take_cores(from_last=True):
            bound = cores_of_team()
            with take_cores(from_last=False):
                return bound, cores_of_team()

    first, second = in_thread(work)  # type: ignore[misc]
    assert first == second


@pytest.mark.usefixtures("as_many_threads_as_cores")
def test_what_runs_alone_has_one_thread() -> None:
    def work() -> tuple[int, int]:
        return len(alone(team)()), len(team())

    assert in_thread(work) == (1, len(CORES))


@pytest.mark.usefixtures("as_many_threads_as_cores")
def test_a_machine_that_refuses_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: int, cores: object) -> None:
        raise OSError(22, "Invalid argument")

    def work() -> dict[int, list[int]]:
        core = take_cores(from_last=True)
        monkeypatch.setattr(os, "sched_setaffinity", refuse)
        with core, take_cores(from_last=True):
            return cores_of_team()

    # What was bound while it was allowed stays so.
    assert in_thread(work) == {0: CORES, 1: CORES[:1]}


def test_who_has_bound_threads_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")

    def work() -> dict[int, list[int]]:
        with take_cores(from_last=False):
            return cores_of_team()

    assert all(cores == CORES for cores in in_thread(work).values())  # type: ignore[attr-defined]


def test_fewer_threads_than_cores_stay_as_they_are() -> None:
    def work() -> dict[int, list[int]]:
        torch.set_num_threads(1)  # of this thread's team
        with take_cores(from_last=False):
            return cores_of_team()

    threads = torch.get_num_threads()
    try:
        assert in_thread(work) == {0: CORES}
    finally:
        torch.set_num_threads(threads)
