"""Waiting until servers that share a machine's cores have come to rest, before something is timed.

An engine's worker polls for a second after its last step, and would slow down whoever is next.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import psutil

from mcp_vllm.demo.engines import Server

# At rest: all together use less than this share of one core.
REST_SHARE = 0.15
_WINDOW_S = 0.3


def wait_until_quiet(servers: Sequence[Server], deadline_s: float) -> bool:
    """Wait until the servers and their descendants are at rest; whether they came to it in time."""
    until_s = time.monotonic() + deadline_s
    used_s, at_s = _cpu_seconds(servers), time.monotonic()
    while at_s < until_s:
        time.sleep(_WINDOW_S)
        now_used_s, now_s = _cpu_seconds(servers), time.monotonic()
        if now_used_s - used_s < REST_SHARE * (now_s - at_s):
            return True
        used_s, at_s = now_used_s, now_s
    return False


def _cpu_seconds(servers: Sequence[Server]) -> float:
    """User and system time of the servers' processes so far."""
    total_s = 0.0
    for server in servers:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(server.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    total_s += times.user + times.system
    return total_s
