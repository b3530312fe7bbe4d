"""torch's OpenMP threads, as far as a thread that waits in the middle of a step has to govern them.

Through the functions that compilers call, which libgomp and LLVM's libraries both have.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

_LIBRARIES = ("libgomp", "libiomp5", "libomp")
_NEEDED = (
    "GOMP_parallel",
    "GOMP_parallel_start",
    "GOMP_parallel_end",
    "omp_get_thread_num",
    "omp_get_num_threads",
    "omp_get_max_threads",
    "omp_set_num_threads",
)
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_SEMAPHORE_BYTES = 64  # more than any sem_t has


class Helpers:
    """The other threads of a thread's OpenMP team, which can be put to sleep while it waits.

    Left alone they spin after their work, for up to milliseconds, each on the core where a thread
    of the process that this one waits for is about to compute. Between `rest` and `wake` this
    thread is inside of a parallel region: what it prepares, encodes and decodes there it computes
    alone, and no layer may run there: kernels that count on all threads would wait for them. All of
    it is called by the thread whose helpers they are.
    """

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        """`library`: torch's; None: they are left alone."""
        self._library = library
        self._libc = ctypes.CDLL(None)
        self._semaphore = ctypes.create_string_buffer(_SEMAPHORE_BYTES)
        self._rest = self._called = False

    @classmethod
    def of_this_machine(cls) -> Helpers:
        return cls(_library())

    def rest(self) -> None:
        """Let them sleep until `wake`."""
        if self._library is None or self._rest:
            return
        threads = self._library.omp_get_max_threads()
        self._libc.sem_init(self._semaphore, 0, 0)
        self._called = False
        self._rest = True  # before, and false before the end: an interrupt may come between
        # They call sem_wait, and this thread goes on. 0: as many threads as usual.
        self._library.GOMP_parallel_start(self._libc.sem_wait, self._semaphore, 0)
        # What is prepared here for the layers says how many threads they will have.
        self._library.omp_set_num_threads(threads)

    def call(self) -> None:
        """Begin to wake them, which takes a while, beside what this thread has still to do."""
        if self._library is None or not self._rest or self._called:
            return
        for _ in range(self._library.omp_get_num_threads() - 1):
            self._libc.sem_post(self._semaphore)
        self._called = True  # after: whom an interrupt keeps from it is called by `wake`

    def wake(self) -> None:
        """Let them take part again; nothing, if they do."""
        if self._library is None or not self._rest:
            return
        self.call()
        self._rest = False
        self._library.GOMP_parallel_end()

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        try:
            self.rest()
            yield
        finally:
            self.wake()


def alone(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """`function`, whose OpenMP regions then have the calling thread alone."""
    library = _library()
    if library is None:
        return function
    torch.get_num_threads()  # so that torch has set its number of threads for this one

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
