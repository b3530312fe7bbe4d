"""A process that writes to a disk store until it is killed: from outside, or by itself inside a
change to a file, of which a part is done then."""

from __future__ import annotations

import os
import random
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from disk_frames import name_of, stored

from mcp_vllm.store.disk import DiskStore

BUDGET_BYTES = 1 << 20
SEGMENT_BYTES = 32 << 10
# What the process says when something is done: of which kind, and the number of the chunk.
ACK = struct.Struct("<BI")
READY, STORED, DISCARDED = 0, 1, 2


def write_until_killed(folder: str, seed: int, first: int, calls_left: int, ack_fd: int) -> None:
    """Store the chunks `first`, `first` + 1, ... and discard some of them.

    Args:
        calls_left: die in that change to a file, counted from here; 0: wait to be killed.
    """
    choose = random.Random(seed)
    store = DiskStore(Path(folder), BUDGET_BYTES, segment_bytes=SEGMENT_BYTES)
    if calls_left:
        _die_in_call(calls_left, choose)
    os.write(ack_fd, ACK.pack(READY, 0))
    number, told = first, []
    while True:
        batch = [
            stored(number + i, choose.randrange(1, 8000)) for i in range(choose.randrange(1, 9))
        ]
        number += len(batch)
        store.write(batch)
        kept = [each.name for each in batch if store.find(each.name) is not None]
        if kept:
            # Until the next is told, it is not for the policy to let this one go.
            store.policy.pin(kept[-1:])
            os.write(ack_fd, ACK.pack(STORED, int.from_bytes(kept[-1].key, "big")))
            store.policy.unpin(told)
            told = kept[-1:]
        if number - first > 100:
            victim = choose.randrange(first, number - 50)
            if name_of(victim) in told:
                continue
            store.discard(name_of(victim))
            os.write(ack_fd, ACK.pack(DISCARDED, victim))
        if choose.random() < 0.05:
            store.compact()


def _die_in_call(calls_left: int, choose: random.Random) -> None:
    left = [calls_left]

    def now() -> bool:
        left[0] -= 1
        return left[0] <= 0

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            if now():
                if choose.random() < 0.5:
                    call(*args, **named)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **named)

        return wrapped

    real_pwritev, real_pwrite = os.pwritev, os.pwrite

    def torn_pwritev(fd: int, buffers: Any, offset: int) -> int:
        if now():
            whole = b"".join(buffers)
            real_pwrite(fd, whole[: choose.randrange(len(whole) + 1)], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return real_pwritev(fd, buffers, offset)

    for name in ("pwrite", "ftruncate", "unlink", "open"):
        setattr(os, name, dying(getattr(os, name)))
    os.pwritev = torn_pwritev
