"""One engine that is told, line by line, what to run, and answers with times. For split_plan.py.

{"engine": {...}}             once: the engine's arguments
{"layers": [2, 6]}            these layers run at the stage from now on
{"prompt": 160, "batch": 4}   ends what runs, begins these -> {"ttft_s": of the first, alone}
{"steps": 5}                  decode steps of all           -> {"token_s": [...]}
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
    span: tuple[int, int] | None = None
    running: list[str] = []
    print(json.dumps({"ready": True}), file=out, flush=True)
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        answer: dict[str, Any] = {}
        if "layers" in asked:
            span = tuple(asked["layers"])
            end(engine, running)
            move(engine, span)
        elif "prompt" in asked:
            end(engine, running)
            running, answer["ttft_s"] = begin(engine, number, asked["prompt"], asked["batch"])
        else:
            answer["token_s"] = [step(engine, set()) for _ in range(asked["steps"])]
        if answer and span is not None and span != held(engine):
            sys.exit(f"layers {span} were asked for, {held(engine)} are at the stage")
        print(json.dumps(answer), file=out, flush=True)


def move(engine: Any, span: tuple[int, int]) -> None:
    """As after a new plan, between two requests."""
    from mcp_vllm.split.replan import Change

    engine.engine_core.engine_core.model_executor._change = Change(span, 0.0, 0.0)


def held(engine: Any) -> tuple[int, int] | None:
    """The layers that a stage really has."""
    executor = engine.engine_core.engine_core.model_executor
    return None if executor._link is None else executor._held.span


def begin(engine: Any, number: int, prompt: int, batch: int) -> tuple[list[str], float]:
    """The names of requests that are decoding together now, and the seconds to the first token of
    the first one, alone."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=10_000, ignore_eos=True, temperature=0.0, detokenize=False)
    names = [f"{number}-{i}" for i in range(batch)]

    def add(index: int) -> None:
        tokens = [(index * 31 + number * 17 + i * 7) % 97 + 3 for i in range(prompt)]
        engine.add_request(names[index], {"prompt_token_ids": tokens}, params)

    add(0)
    ttft_s = 0.0
    answered: set[str] = set()
    while not answered:
        ttft_s += step(engine, answered)
    for index in range(1, batch):
        add(index)
    while len(answered) < batch:
        step(engine, answered)
    return names, ttft_s


def end(engine: Any, names: list[str]) -> None:
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    engine.step()


def step(engine: Any, answered: set[str]) -> float:
    started = time.perf_counter()
    outputs = engine.step()
    seconds = time.perf_counter() - started
    answered |= {each.request_id for each in outputs if each.outputs[0].token_ids}
    return seconds


if __name__ == "__main__":
    main()
