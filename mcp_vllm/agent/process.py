"""An agent as a process of its own: what the process's memory is told before it serves."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import sys
from concurrent.futures import Future
from pathlib import Path

from mcp_vllm.agent.server import Agent
from mcp_vllm.config import Config

# Of glibc's mallopt.
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
# Chunks and frames of that size go back to the system when they leave the store: on the heap they
# would leave holes, and the process would be far larger than its store.
MMAP_THRESHOLD_BYTES = 64 << 10
ARENAS = 2


def serve(config: Config, socket_path: Path, *, owned: bool) -> None:
    """Run an agent until it is told to end: see `Agent.run`, for the errors, too."""
    _return_large_blocks()
    agent = Agent(config, socket_path, owned)
    agent.codecs_loaded.add_done_callback(_keep_what_was_imported)
    asyncio.run(agent.run())


def _return_large_blocks() -> None:
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        mallopt(M_ARENA_MAX, ARENAS)


def _keep_what_was_imported(_: Future[None]) -> None:
    """Modules and kernels stay as long as the process: the garbage collector need not look through
    them again and again, which holds up everything for a tenth of a second each time."""
    gc.freeze()
