"""What a machine's engine takes for steps of many shapes: a short run, in a process of its own.

    python -m mcp_vllm.split.engine.measure < MeasureRequest > Figures

vLLM runs the model's first layers with made-up weights, so a model that does not fit is measured,
too: its layers are timed one by one, and a step without them is the rest. No token of it means
anything. Called by `split/plan/measure.py`; standard output is the figures alone.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from mcp_vllm.split.engine.layer_timer import LayerTimer
from mcp_vllm.split.engine.machine import free_bytes, machine_name, native_dtypes
from mcp_vllm.split.plan.figures import WAIT_S, Figures, typical, typical_times
from mcp_vllm.split.plan.request import MeasureRequest
from mcp_vllm.split.plan.shape import Work

_DECODE_STEPS = 12
_KV_BYTES = 1 << 30


@dataclass
class _Timed:
    """Seconds of the steps of one shape: each layer's, and the rest; each layer's of steps that
    paused before the middle one."""

    layers: list[list[float]] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)
    paused: list[list[float]] = field(default_factory=list)

    @property
    def resume_s(self) -> float:
        """What the layers after a pause take more; what comes before and after them varies by as
        much from one step to the next."""
        paused, others = (
            typical([sum(each[len(each) // 2 :]) for each in steps])
            for steps in (self.paused, self.layers)
        )
        return paused - others


class _Engine:
    """A vLLM engine whose core runs in this process, step by step."""

    def __init__(self, request: MeasureRequest) -> None:
        from vllm import LLM

        self._vllm = LLM(
            model=request.model,
            dtype=request.dtype,
            load_format="dummy",
            hf_overrides=_first_layers(request.layers),
            enforce_eager=True,
            enable_prefix_caching=False,
            async_scheduling=False,
            max_num_batched_tokens=request.budget,
            max_num_seqs=request.batch,
            max_model_len=request.context,
            kv_cache_memory_bytes=_KV_BYTES,
            skip_tokenizer_init=True,
        ).llm_engine
        runner = self._vllm.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self.hidden = runner.model_config.get_hidden_size()
        self.device = runner.device
        layers = _stack(runner.model, request.layers)
        layers[len(layers) // 2].register_forward_pre_hook(self._pause)  # before its timer starts
        self._timer = LayerTimer(layers, self.device)
        self._pauses = False
        self._number = 0
        self.timed: dict[Work, _Timed] = defaultdict(_Timed)

    def run(self, requests: int, prompt: int, budget: int) -> None:
        """So many prompts of this length at once, and some steps of decode."""
        from vllm import SamplingParams

        total = requests * prompt
        # The first of several prompts generates while the last is prefilled.
        most = _DECODE_STEPS + 2 + total // budget
        params = SamplingParams(max_tokens=most, ignore_eos=True, temperature=0.0, detokenize=False)
        for _ in range(requests):
            self._number += 1
            tokens = [(self._number * 7 + i * 13) % 97 + 3 for i in range(prompt)]
            self._vllm.add_request(str(self._number), {"prompt_token_ids": tokens}, params)
        for start in range(0, total, budget):
            step = min(budget, total - start)
            shape = None
            if requests == 1:
                shape = Work(1, step, start + step)
            elif total <= budget:
                shape = Work(requests, prompt, prompt)
            self._step(shape)
        for i in range(_DECODE_STEPS):
            # Of the first step the caches are cold, and prompts in pieces end at different times.
            self._step(Work(requests, 1, prompt + i + 1) if i else None, pauses=i % 2 == 0)
        while self._vllm.has_unfinished_requests():
            self._step(None)

    def _pause(self, *_: Any) -> None:
        if self._pauses:
            time.sleep(WAIT_S)  # where the middle layers of a split would be

    def _step(self, work: Work | None, pauses: bool = False) -> None:
        self._pauses = pauses
        started = time.perf_counter()
        outputs = self._vllm.step()
        seconds = time.perf_counter() - started
        is_whole = work is not None and (not work.is_decode or len(outputs) == work.requests)
        if work is not None and is_whole:
            timed = self.timed[_rounded(work)]
            layers = list(self._timer.seconds)
            if pauses:
                timed.paused.append(layers)
                return
            timed.layers.append(layers)
            timed.rest.append(max(seconds - sum(layers), 1e-6))


def measure(request: MeasureRequest) -> Figures:
    memory_bytes = free_bytes()
    engine = _Engine(request)
    shapes = request.shapes()
    engine.run(*shapes[0], request.budget)  # warms up kernels and allocators
    engine.timed.clear()
    for _ in range(request.repeat):
        for requests, prompt in shapes:
            engine.run(requests, prompt, request.budget)
    layers, rest = [], []
    measured = {work: timed for work, timed in engine.timed.items() if timed.rest}
    resuming = [each.resume_s for each in measured.values() if each.paused]
    for work, steps in measured.items():
        times, beside = typical_times(work, steps.layers, steps.rest)
        layers += times
        rest.append(beside)
    return Figures(
        kind="engine",
        machine=machine_name(),
        model=os.path.basename(os.path.normpath(request.model)),
        hidden=engine.hidden,
        dtype=request.dtype,
        dtypes=native_dtypes(engine.device),
        memory_bytes=request.memory_bytes or memory_bytes,
        layers=layers,
        rest=rest,
        resume_s=max(0.0, statistics.median(resuming)),
    )


def _first_layers(number: int) -> Any:
    """What shortens a model's config."""

    def shorten(config: Any) -> Any:
        text = config.get_text_config()
        kinds = getattr(text, "layer_types", None)
        text.num_hidden_layers = number
        if kinds is not None:
            text.layer_types = list(kinds)[:number]
        return config

    return shorten


def _stack(model: torch.nn.Module, number: int) -> torch.nn.ModuleList:
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == number:
            return module
    raise RuntimeError(f"vLLM's {type(model).__name__} has no stack of {number} layers")


def _rounded(work: Work) -> Work:
    """Decode steps of one run are one sample: the context in steps of 16 tokens."""
    if not work.is_decode:
        return work
    return Work(work.requests, 1, -(-work.context // 16) * 16)


if __name__ == "__main__":
    out = os.dup(1)
    os.dup2(2, 1)  # vLLM writes to standard output, too
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    figures = measure(MeasureRequest.model_validate_json(sys.stdin.buffer.read()))
    with os.fdopen(out, "w") as stdout:
        stdout.write(figures.model_dump_json())
