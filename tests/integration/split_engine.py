"""A vLLM engine in a process of its own that plays a scenario, for tests of the layer split.

    python -m tests.integration.split_engine < scenario.json > result.json

The engine core runs in the same process, step by step, so that a scenario can say at which step a
request arrives or is aborted, or a stage is killed, and the same scenario gives the same batches.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec


class Request(msgspec.Struct):
    """One request: when it comes, and when it is aborted (steps of the engine; None: never)."""

    prompt: list[int]
    max_tokens: int
    arrives: int = 0
    aborted: int | None = None
    temperature: float = 0.0
    seed: int | None = None


class Signal(msgspec.Struct):
    """A signal for a process (SIGKILL, SIGSTOP) before the engine's step `step`."""

    step: int
    pid: int
    name: str


class Scenario(msgspec.Struct):
    engine: dict[str, Any]
    rounds: list[list[Request]]
    signals: list[Signal] = []
    name: str = "request"


class Answer(msgspec.Struct):
    """Tokens, and for each the gap between the two most likely ones (log probabilities)."""

    tokens: list[int]
    gaps: list[float]
    cached: int
    aborted: bool
    finish_reason: str | None = None


class Result(msgspec.Struct):
    answers: list[list[Answer]]
    step_s: list[float]
    preemptions: int
    rss_anon_bytes: int
    kv_layers: int


def rss_anon_bytes(pid: int | str = "self") -> int:
    """Memory of a process that is its own: no file pages, as those of weights being read."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no RssAnon of process {pid}")


def play(scenario: Scenario) -> Result:
    from vllm import LLM

    import mcp_vllm.vllm_plugin

    mcp_vllm.vllm_plugin.register()
    engine = LLM(**scenario.engine, disable_log_stats=False).llm_engine
    step_s: list[float] = []
    preemptions = 0
    answers = []
    for number, requests in enumerate(scenario.rounds):
        signals = scenario.signals if number == 0 else []
        prefix = f"{scenario.name}-{number}"
        answers.append(_play_round(engine, prefix, requests, signals, step_s))
    core = engine.engine_core.engine_core
    for each in engine.get_metrics():
        if each.name == "vllm:num_preemptions":
            preemptions = int(each.value)
    runner = core.model_executor.driver_worker.worker.model_runner
    return Result(
        answers,
        step_s,
        preemptions,
        rss_anon_bytes(),
        len(runner.kv_caches),
    )


def _play_round(
    engine: Any,
    name: str,
    requests: list[Request],
    signals: list[Signal],
    step_s: list[float],
) -> list[Answer]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    answers = [Answer([], [], 0, False) for _ in requests]
    step = 0
    while step <= max(each.arrives for each in requests) or engine.has_unfinished_requests():
        for index, each in enumerate(requests):
            if each.arrives == step:
                params = SamplingParams(
                    temperature=each.temperature,
                    seed=each.seed,
                    max_tokens=each.max_tokens,
                    ignore_eos=True,
                    logprobs=2,
                    output_kind=RequestOutputKind.FINAL_ONLY
                    if each.aborted is None
                    else RequestOutputKind.CUMULATIVE,
                )
                prompt = {"prompt_token_ids": each.prompt}
                engine.add_request(f"{name}-{index}", prompt, params)
            if each.aborted == step:
                engine.abort_request([f"{name}-{index}"])
                answers[index].aborted = True
        for each in signals:
            if each.step == step:
                os.kill(each.pid, getattr(signal, each.name))
        started = time.perf_counter()
        outputs = engine.step()
        step_s.append(time.perf_counter() - started)
        for output in outputs:
            index = int(output.request_id.removeprefix(f"{name}-"))
            _keep(answers[index], output)
        step += 1
    return answers


def _keep(answer: Answer, output: Any) -> None:
    completion = output.outputs[0]
    answer.tokens = list(completion.token_ids)
    answer.cached = output.num_cached_tokens or 0
    answer.finish_reason = completion.finish_reason
    answer.gaps = []
    for candidates in completion.logprobs or ():
        best = sorted((each.logprob for each in candidates.values()), reverse=True)[:2]
        answer.gaps.append(best[0] - best[-1])


if __name__ == "__main__":
    out = os.dup(1)
    os.dup2(2, 1)  # vLLM writes to standard output, too
    played = play(msgspec.json.decode(sys.stdin.buffer.read(), type=Scenario))
    with os.fdopen(out, "w") as stdout:
        json.dump(msgspec.to_builtins(played), stdout)
