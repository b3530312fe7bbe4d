"""A core for each OpenMP thread, where an engine and its stage share a machine of two.

One computes while the other waits, but OpenMP's threads spin for a moment after their work. The
kernel sees a core that is busy so and puts two computing threads of the other process on the same
core: a step of six layers then takes 20 to 40 ms in place of 10. With a core for each thread that
cannot happen. Engine and stage count the cores from opposite ends, so that the two threads that
prepare a step do so side by side.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mcp_vllm.split.engine.openmp import team

logger = logging.getLogger(__name__)

# A user who has set one of these knows better.
_GIVEN = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


@dataclass(frozen=True)
class Core:
    """A thread's own core, used inside `with`; threads and processes that it starts outside of that
    have all cores, as they would without it.

    Attributes:
        own: the core, or all: there is nothing to bind.
        all: those that the thread has otherwise.
    """

    own: frozenset[int] = frozenset()
    all: frozenset[int] = frozenset()

    def __enter__(self) -> None:
        if self.own != self.all:
            _bind(0, self.own)

    def __exit__(self, *_: object) -> None:
        if self.own != self.all:
            _bind(0, self.all)


def take_cores(*, from_last: bool) -> Core:
    """Bind the other thread of this one's OpenMP team to a core, and find this one's: of two cores
    the first, or the last.

    Only where there are two cores and as many threads: of a larger team libgomp ends some threads
    and starts others, which would have the core of the one that started them. Nothing is done,
    either, where OpenMP is not to be found or the machine refuses.
    """
    if any(name in os.environ for name in _GIVEN) or not hasattr(os, "sched_getaffinity"):
        return Core()
    cores = sorted(os.sched_getaffinity(0), reverse=from_last)
    torch.get_num_threads()  # so that torch has set its number of threads for this one
    threads = team()
    if len(cores) != 2 or sorted(threads) != [0, 1]:
        logger.debug("%d OpenMP threads on %d cores stay as they are", len(threads), len(cores))
        return Core()
    if not _bind(threads[1], {cores[1]}):
        return Core()
    return Core(frozenset(cores[:1]), frozenset(cores))


def _bind(thread: int, cores: Iterable[int]) -> bool:
    """Whether it could be done: cores may be taken away at any time, and no step shall fail."""
    try:
        os.sched_setaffinity(thread, cores)
    except OSError as error:
        logger.debug("thread %d is not bound to %s: %s", thread, sorted(cores), error)
        return False
    return True
