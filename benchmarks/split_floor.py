"""What two processes cost each other that compute in turn on the same cores, without any split.

    python benchmarks/split_floor.py [--model PATH] [--json F]

Two whole engines decode, first each for itself, many steps after one another, then a step of one
and a step of the other in turn. No layer, token or byte goes from one to the other: what a step
takes longer in turns is what it costs to find the caches full of the other's work and one's OpenMP
threads asleep. A layer split between processes that share cores hands over twice a step (to the
stage and back), each time after part of a step only: this is a hint at what sharing costs it, not a
bound. See split.py for what it takes.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from setting import describe, one_line
from split import SKIPPED, add_run_options, begin, engine_process, whole_engine

from mcp_vllm.demo.weights import ensure_gemma

NAMES = ("first", "second")
MODES = ("alone", "in turns")

# "alone" or "in turns" -> batch -> milliseconds of every step.
Steps = dict[str, dict[int, list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_run_options(parser, starts=2)
    args = parser.parse_args()
    if args.engine is not None:
        return serve_steps(json.loads(args.engine))
    model = str(args.model or ensure_gemma())
    starts = [measure_start(model, args, args.logs / f"floor-{n}") for n in range(args.starts)]
    report(Console(), starts, args)
    if args.json:
        args.json.write_text(json.dumps({"setting": describe(), "starts": starts}, indent=2) + "\n")
    return None


def measure_start(model: str, args: argparse.Namespace, logs: Path) -> Steps:
    """Both engines started once; a round before those that count warms up."""
    times: Steps = {mode: {batch: [] for batch in args.batches} for mode in MODES}
    with contextlib.ExitStack() as stack:
        settings = whole_engine(model)
        engines = [
            stack.enter_context(
                engine_process(__file__, settings, logs / f"{name}.log", shares_cores=True)
            )
            for name in NAMES
        ]
        with Progress(transient=True) as progress:
            for number in progress.track(range(args.rounds + 1), description="rounds"):
                for batch in args.batches:
                    for mode in MODES if number % 2 else reversed(MODES):
                        measured = round_of(engines, batch, args.steps, mode)
                        if number:
                            times[mode][batch] += measured
    return times


def round_of(
    engines: list[subprocess.Popen[str]], batch: int, steps: int, mode: str
) -> list[float]:
    """Milliseconds of the steps of both engines."""
    for each in engines:
        ask(each, [batch, steps])
    total = steps + SKIPPED
    order = [e for _ in range(total) for e in engines]
    if mode == "alone":
        order = [e for e in engines for _ in range(total)]
    times: dict[int, list[float]] = {each.pid: [] for each in engines}
    for each in order:
        times[each.pid].append(ask(each, "step"))
    return [step for of_engine in times.values() for step in of_engine[SKIPPED:]]


def ask(engine: subprocess.Popen[str], request: object) -> float:
    assert engine.stdin is not None
    assert engine.stdout is not None
    print(json.dumps(request), file=engine.stdin, flush=True)
    return float(engine.stdout.readline())


def serve_steps(settings: dict[str, object]) -> None:
    """The engine's process: [batch, steps] begins requests, "step" is one of them; answers are a
    step's milliseconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes to standard output, too
    from vllm import LLM

    engine = LLM(**settings).llm_engine
    print("ready", file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        if (request := json.loads(line)) != "step":
            while engine.has_unfinished_requests():
                engine.step()
            begin(engine, number, *request)
        started = time.perf_counter()
        engine.step()
        print(1000 * (time.perf_counter() - started), file=answers, flush=True)


def report(console: Console, starts: list[Steps], args: argparse.Namespace) -> None:
    table = Table(
        title=f"Decode steps in ms of two whole engines, {args.starts} starts of {args.rounds} "
        f"rounds of {args.steps}"
    )
    for name in ("batch", "steps", "p10", "p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for batch in args.batches:
        for mode in MODES:
            steps = [step for start in starts for step in start[mode][batch]]
            cuts = statistics.quantiles(steps, n=100)
            table.add_row(str(batch), mode, *(f"{cuts[p - 1]:.2f}" for p in (10, 50, 90, 99)))
    console.print(table)
    for batch in args.batches:
        more = [
            statistics.median(start["in turns"][batch]) - statistics.median(start["alone"][batch])
            for start in starts
        ]
        console.print(
            f"batch {batch}: a step in turns takes {statistics.mean(more):.1f} ms longer "
            f"({', '.join(f'{each:.1f}' for each in more)}); a split hands over twice a step"
        )
    console.print(one_line())


if __name__ == "__main__":
    main()
