"""One engine that is told, line by line, what to run, and answers with times. For split_plan.py.

{"engine": {...}}                                      once: the engine's arguments
{"layers": [2, 6]}                                     these layers run at the stage from now on
{"prompt": 160, "answer": 12, "batch": 1, "repeat": 4}  -> {"ttft_s": [...], "token_s": [...]}
"""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes to standard output, too
    from vllm import LLM

    import mcp_vllm.vllm_plugin

    mcp_vllm.vllm_plugin.register()
    engine = LLM(**json.loads(sys.stdin.readline())["engine"]).llm_engine
    number = 0
    span: tuple[int, int] | None = None
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "layers" in asked:
            span = tuple(asked["layers"])
            move(engine, span)
            print(json.dumps({"moved": True}), file=out, flush=True)
            continue
        ttft_s: list[float] = []
        token_s: list[float] = []
        for repeat in range(asked["repeat"] + 1):
            number += 1
            first, rest = run(engine, str(number), asked)
            if span is not None and span != held(engine):
                sys.exit(f"layers {span} were asked for, {held(engine)} are at the stage")
            if repeat:  # the first one warms up
                ttft_s.append(first)
                token_s += rest
        print(json.dumps({"ttft_s": ttft_s, "token_s": token_s}), file=out, flush=True)


def move(engine: Any, span: tuple[int, int]) -> None:
    """As after a new plan, between two requests."""
    from mcp_vllm.split.replan import Change

    engine.engine_core.engine_core.model_executor._change = Change(span, 0.0, 0.0)


def held(engine: Any) -> tuple[int, int] | None:
    """The layers that a stage really has."""
    executor = engine.engine_core.engine_core.model_executor
    return None if executor._link is None else executor._held.span


def run(engine: Any, name: str, asked: dict[str, int]) -> tuple[float, list[float]]:
    """Seconds to the first token of the first prompt, alone; then those of decode steps of all."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=10_000, ignore_eos=True, temperature=0.0, detokenize=False)
    names = [f"{name}-{i}" for i in range(asked["batch"])]

    def add(index: int) -> None:
        tokens = [(index * 31 + int(name) * 17 + i * 7) % 97 + 3 for i in range(asked["prompt"])]
        engine.add_request(names[index], {"prompt_token_ids": tokens}, params)

    add(0)
    ttft_s = 0.0
    answered: set[str] = set()
    while not answered:
        ttft_s += step(engine, answered)
    for index in range(1, asked["batch"]):
        add(index)
    while len(answered) < asked["batch"]:
        step(engine, answered)
    step(engine, answered)
    token_s = [step(engine, answered) for _ in range(asked["answer"])]
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        step(engine, answered)
    engine.step()
    return ttft_s, token_s


def step(engine: Any, answered: set[str]) -> float:
    started = time.perf_counter()
    outputs = engine.step()
    seconds = time.perf_counter() - started
    answered |= {each.request_id for each in outputs if each.outputs[0].token_ids}
    return seconds


if __name__ == "__main__":
    main()
