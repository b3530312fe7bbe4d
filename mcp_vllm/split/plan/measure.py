"""Measures this machine, in a process that has vLLM and ends with the run."""

from __future__ import annotations

import os
import subprocess
import sys

from pydantic import ValidationError

from mcp_vllm.split.errors import SplitError
from mcp_vllm.split.plan.figures import Figures
from mcp_vllm.split.plan.request import MeasureRequest
from mcp_vllm.vllm_plugin.shared_cores import share_cores

_LONGEST_S = 1800.0


class MeasuringFailed(SplitError):
    """vLLM did not start or did not finish; repeats its last words."""


def measure_here(request: MeasureRequest, shares_cores: bool = False) -> Figures:
    """Figures of this machine: vLLM runs the model's first layers with made-up weights.

    Args:
        shares_cores: a stage will run on this machine, too: threads wait as they do then.

    Raises MeasuringFailed.
    """
    environ = dict(os.environ)
    if shares_cores:
        share_cores(environ)
    command = [sys.executable, "-m", "mcp_vllm.split.engine.measure"]
    try:
        ran = subprocess.run(
            command,
            input=request.model_dump_json().encode(),
            capture_output=True,
            env=environ,
            timeout=_LONGEST_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MeasuringFailed(f"measuring {request.model} took over {_LONGEST_S:g} s") from None
    if ran.returncode != 0:
        words = ran.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise MeasuringFailed(
            f"measuring {request.model} on this machine failed: {words[0][:500]}; give --local a "
            "file of `mcp-vllm plan --measure` instead"
        )
    try:
        return Figures.model_validate_json(ran.stdout)
    except ValidationError as error:
        raise MeasuringFailed(f"measuring {request.model}: no figures came: {error}") from error
