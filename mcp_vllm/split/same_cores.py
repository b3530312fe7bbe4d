"""Whether an engine and a stage have the same cores: their addresses do not tell, in containers or
behind a proxy."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def cores_name() -> str:
    """Equal in two processes that may use the same cores of one machine, and only there; tells
    nothing else. Empty where that cannot be known."""
    if not hasattr(os, "sched_getaffinity"):
        return ""
    try:
        boot = _BOOT_ID.read_text()
    except OSError:
        return ""
    cores = sorted(os.sched_getaffinity(os.getpid()))
    return hashlib.sha256(f"mcp_vllm {boot.strip()} {cores}".encode()).hexdigest()
