"""Whether an engine and a stage have the same cores: their addresses do not tell, in containers or
behind a proxy."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Of the process, before OpenMP may bind its main thread.
_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def name_cores() -> str:
    """A name that only a process with the same cores of the same machine, as it was started, can
    tell to be its own (`has_cores`); another one each time. Empty where that cannot be known."""
    return _named(secrets.token_hex(16))


def has_cores(name: str) -> bool:
    """Whether `name` is of this process's cores."""
    ours = _named(name.partition(":")[0])
    return bool(ours) and hmac.compare_digest(ours.encode(), name.encode())


def _named(salt: str) -> str:
    try:
        boot = _BOOT_ID.read_text().strip()
    except OSError:
        return ""
    digest = hashlib.sha256(f"{salt} {boot} {_CORES}".encode()).hexdigest()
    return f"{salt}:{digest}" if _CORES else ""
