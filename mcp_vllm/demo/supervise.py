"""The process between a test or demo and a server it starts: nothing outlives its owner.

Run as a script: `supervise.py GRACE_S COMMAND...`. It starts the command and waits. SIGTERM, or the
end of its standard input, makes it end the command: SIGTERM, GRACE_S seconds of grace, then SIGKILL
for everything that is left. SIGQUIT makes it skip the grace. Standard input is how it notices that
its owner is gone, however the owner died; the kernel's parent-death signal is no substitute, for it
fires when the owner's *thread* ends. As a child subreaper it also finds descendants whose parents
died or that moved to another session. It exits as the command did (128 + number of the signal).
"""

import ctypes
import math
import os
import select
import signal
import subprocess
import sys
import time

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_POLL_INTERVAL_S = 0.1
_KILL_DEADLINE_S = 5.0


def adopt_orphans() -> None:
    """Become the parent of descendants that lose theirs (Linux only)."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1)):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def owner_is_gone(timeout_s: float) -> bool:
    """Wait up to `timeout_s` for the end of standard input."""
    readable, _, _ = select.select([sys.stdin], [], [], timeout_s)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


def kill_descendants() -> None:
    """SIGKILL every descendant until none is left."""
    me = psutil.Process()
    while descendants := me.children(recursive=True):
        for descendant in descendants:
            try:
                descendant.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(descendants, _KILL_DEADLINE_S)


def supervise(grace_s: float, command: list[str]) -> int:
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda number, _frame: received.append(number))
    adopt_orphans()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    killed_at = math.inf
    while child.poll() is None and time.monotonic() < killed_at and signal.SIGQUIT not in received:
        if killed_at < math.inf:
            time.sleep(_POLL_INTERVAL_S)
        elif owner_is_gone(_POLL_INTERVAL_S) or received:
            killed_at = time.monotonic() + grace_s
            child.terminate()
    child.kill()
    code = child.wait()
    kill_descendants()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(supervise(float(sys.argv[1]), sys.argv[2:]))
