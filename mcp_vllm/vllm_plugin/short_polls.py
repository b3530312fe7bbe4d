"""How long vLLM's processes poll for each other's messages, where that costs cores that compute.

A process of vLLM that has read a message polls for the next one for a second before it sleeps.
Beside an accelerator nobody misses that core. On the CPU platform every core computes, and there is
a message before each import and after it: the engine then polls while the worker's threads wait for
each other at barriers. On two cores, a step of 66 tokens of Gemma-3-270m after an import took 75 to
850 ms so, and 75 to 90 with short polls.
"""

from __future__ import annotations

import time
from functools import wraps

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

# Waking a process that sleeps takes a tenth of that.
POLL_S = 0.001
# A notice can be lost that is sent right after another (its socket holds one). While vLLM would
# poll, look again so often; after that a reader sleeps as it does without us.
RECHECK_MS = 5
VLLM_POLL_S = 1.0


def shorten_polls() -> None:
    """Let this process sleep when no message has come for `POLL_S`. Idempotent."""
    polling = SpinCondition.wait
    if hasattr(polling, "__wrapped__"):
        return

    @wraps(polling)
    def wait(self: SpinCondition, timeout_ms: int | None = None) -> None:
        self.busy_loop_s = min(self.busy_loop_s, POLL_S)
        if time.monotonic() <= self.last_read + VLLM_POLL_S:
            timeout_ms = RECHECK_MS if timeout_ms is None else min(timeout_ms, RECHECK_MS)
        polling(self, timeout_ms)

    SpinCondition.wait = wait
