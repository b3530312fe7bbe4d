"""What only a running vLLM can tell: its platform, and whether two processes hash blocks alike.

Each probe is a child process (`mcp_vllm.vllm_plugin.probe`), so that the random seeds differ as
they do between engines, and so that a vLLM that crashes on import takes nothing with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mcp_vllm.doctor.check import Check, fail, ok, warn

NUM_PROBES = 2
# Importing vLLM takes seconds on an idle machine, minutes where disk and cores are busy.
DEADLINE_S = 180.0
PLATFORMS = {
    "cpu": "CPU: the KV cache is host memory, copied by a worker of ours",
    "cuda": "CUDA: copies are vLLM's own; this project's tests run on CPU only",
    "rocm": "ROCm: copies are vLLM's own; this project's tests run on CPU only",
    "xpu": "XPU: copies are vLLM's own; this project's tests run on CPU only",
}


@dataclass(frozen=True)
class Probe:
    """What one child process said; `fault` instead, when it said nothing of use (in time)."""

    platform: str = ""
    algorithm: str = ""
    block_hash: str = ""
    fault: str = ""
    is_late: bool = False


def run_probes(algorithm: str | None, deadline_s: float = DEADLINE_S) -> list[Probe]:
    """Two children side by side, without PYTHONHASHSEED. None: vLLM's default algorithm."""
    command = [
        sys.executable,
        "-m",
        "mcp_vllm.vllm_plugin.probe",
        *([algorithm] if algorithm else []),
    ]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    children = [
        subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(NUM_PROBES)
    ]
    return [_answer(child, deadline_s) for child in children]


def _answer(child: subprocess.Popen[str], deadline_s: float) -> Probe:
    try:
        out, err = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return Probe(fault=f"vLLM did not answer within {deadline_s:.0f} s", is_late=True)
    if child.returncode:
        last = (err.strip() or out.strip() or "no output").splitlines()[-1]
        return Probe(fault=f"vLLM cannot be used (exit status {child.returncode}): {last}")
    return parse(out)


def parse(out: str) -> Probe:
    """The probe's answer: its last line, because vLLM may log before it."""
    try:
        return Probe(**json.loads(out.strip().splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        return Probe(fault=f"not an answer: {out.strip()[-200:]!r}")


def check_platform(probe: Probe) -> Check:
    """Where vLLM would run, and what that means for us."""
    if probe.fault:
        return _unknown("platform", probe)
    if probe.platform not in PLATFORMS:
        return fail(
            "platform",
            f"vLLM runs on {probe.platform!r}, where it has no KV offloading",
            "use a CPU, CUDA, ROCm or XPU build",
        )
    return ok("platform", PLATFORMS[probe.platform])


def check_block_hash(probes: Sequence[Probe], environ: Mapping[str, str]) -> Check:
    """Two processes must give a block of the same tokens the same name."""
    name = "block hash"
    for probe in probes:
        if probe.fault:
            return _unknown(name, probe)
    algorithm, seed = probes[0].algorithm, environ.get("PYTHONHASHSEED")
    if len({probe.block_hash for probe in probes}) == 1:
        if seed is None:
            return ok(name, f"{algorithm}: {len(probes)} processes agree")
        return warn(
            name,
            f"PYTHONHASHSEED={seed} is part of every block's name",
            "give every engine of every peer the same PYTHONHASHSEED, or none",
        )
    if seed is not None:
        return warn(
            name,
            f"{algorithm}: processes agree only because PYTHONHASHSEED={seed}",
            "give every engine of every peer the same, or use --prefix-caching-hash-algo sha256",
        )
    return fail(
        name,
        f"{algorithm}: two processes name the same tokens differently and so share nothing",
        "use --prefix-caching-hash-algo sha256 (or sha256_cbor), or set PYTHONHASHSEED to the same "
        "number for every engine",
    )


def _unknown(name: str, probe: Probe) -> Check:
    if probe.is_late:
        return warn(name, probe.fault, "the machine is busy, or vLLM hangs: ask again later")
    return fail(name, probe.fault, "mend vLLM first: it must start without us")
