"""Memory: the host cache in /dev/shm, and everything together in RAM (a container's limit counts).

Only the host cache lies in /dev/shm. Landing slots are anonymous shared memory, which the size of
/dev/shm does not bound; they count as RAM.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from mcp_vllm.config import Config
from mcp_vllm.doctor.check import Check, fail, ok, warn

SHARED_MEMORY = Path("/dev/shm")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
MIB = 1 << 20


def check_shared_memory(config: Config, folder: Path = SHARED_MEMORY) -> Check:
    """Is there room for the host cache of one engine?"""
    name = "shared memory"
    try:
        stat = os.statvfs(folder)
    except OSError as error:
        return fail(name, f"{folder}: {error.strerror}", f"mount a tmpfs at {folder}")
    free, needed = stat.f_bavail * stat.f_frsize, int(config.host_cache_bytes)
    found = f"{free // MIB} MiB free in {folder}, host_cache_bytes is {needed // MIB} MiB an engine"
    if needed > free:
        return fail(
            name, found, f"lower host_cache_bytes, or enlarge {folder} (docker run --shm-size)"
        )
    return ok(name, found)


def check_ram(
    config: Config,
    total_bytes: int | None = None,
    available_bytes: int | None = None,
    limit_file: Path = CGROUP_LIMIT,
) -> Check:
    """Do the store, one engine's host cache and its landing slots fit? The model comes on top."""
    memory = psutil.virtual_memory()
    total = min(total_bytes or memory.total, _limit_bytes(limit_file) or memory.total)
    available = min(available_bytes or memory.available, total)
    agent = config.agent
    needed = int(agent.ram_bytes) + int(agent.landing_bytes) + int(config.host_cache_bytes)
    found = (
        f"{needed // MIB} MiB for ram_bytes + landing_bytes + host_cache_bytes; "
        f"{available // MIB} of {total // MIB} MiB available"
    )
    remedy = "lower agent.ram_bytes or host_cache_bytes"
    if needed > total:
        return fail("memory", found, remedy)
    if needed > available:
        return warn("memory", found, f"{remedy}, unless what is in use now is what it counts")
    return ok("memory", found)


def _limit_bytes(limit_file: Path) -> int | None:
    """The container's memory limit, where there is one."""
    try:
        text = limit_file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
