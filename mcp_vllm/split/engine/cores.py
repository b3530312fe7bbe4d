"""A core for each OpenMP thread, where an engine and its stage share a machine of two.

One computes while the other waits, but OpenMP's threads spin for a moment after their work. The
kernel sees a core that is busy so and puts two computing threads of the other process on the same
core: a step of six layers then takes 20 to 40 ms in place of 10. With a core for each thread that
cannot happen. Engine and stage count the cores from opposite ends, so that the two threads that
prepare a step do so side by side.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

logger = logging.getLogger(__name__)

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

# A user who has set one of these knows better.
_GIVEN = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_LIBRARIES = ("libgomp", "libiomp5", "libomp")
_NEEDED = ("GOMP_parallel", "omp_get_thread_num", "omp_get_max_threads", "omp_set_num_threads")
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


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


def alone(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """`function`, whose OpenMP regions then have the calling thread alone."""
    library = _library()
    if library is None:
        return function
    torch.get_num_threads()  # as in `take_cores`

    @functools.wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        threads = library.omp_get_max_threads()
        library.omp_set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            library.omp_set_num_threads(threads)

    return run


def team() -> dict[int, int]:
    """The kernel's ids of this thread and the others of its OpenMP team, by their number there.

    Empty: torch's OpenMP library is not to be found.
    """
    library = _library()
    threads: dict[int, int] = {}
    if library is not None:

        @_Body
        def note(_: object) -> None:
            threads[library.omp_get_thread_num()] = threading.get_native_id()

        # What a compiler makes of `#pragma omp parallel`; 0: as many threads as usual, no flags.
        library.GOMP_parallel(note, None, 0, 0)
    return threads


def _library() -> ctypes.CDLL | None:
    """The one that torch uses: preloaded, or loaded by torch."""
    with contextlib.suppress(OSError):
        mapped = Path("/proc/self/maps").read_text().splitlines()
        paths = sorted({line.split(maxsplit=5)[-1] for line in mapped if "/" in line})
        loaded = [each for each in paths if Path(each).name.startswith(_LIBRARIES)]
        for path in (None, *loaded):
            library = ctypes.CDLL(path)
            if all(hasattr(library, name) for name in _NEEDED):
                return library
    return None
