"""What a layer split costs a decode step on loopback, over the whole engine on the same machine.

    python benchmarks/split.py [--model PATH] [--dtype D] [--layers 6:12] [--form raw] [--json F]

A whole engine, and a split one with its stage, each with the same requests; bursts of a few decode
steps go to them in turn (whole, split, split, whole, ...). A virtual machine may be twice as slow
for some seconds, so only bursts that follow one another are compared. The stage computes while the
engine waits, so on one machine the two should take as long as the whole engine: what is more is
serialisation, loopback and waking up. The other engine is idle meanwhile. Two overheads are given:
of whole steps, and of the layers: from the first one's start to the last one's end, with the
stage's and the way there and back in between, over the whole engine's layers.

How fast a process computes depends on where its memory came to lie: the same engine, started again,
may be a fifth slower for as long as it lives. So all of them are started anew a few times; figures
are of all starts, and the overhead is given for each, too.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from setting import describe, one_line

from mcp_vllm.demo.engines import Server, default_environment, free_port
from mcp_vllm.demo.weights import ensure_gemma
from mcp_vllm.vllm_plugin.shared_cores import share_cores

CONTEXT = 64
MODEL_LEN = 1024
SKIPPED = 3  # steps after the prefill that are not counted
BURST = 6  # steps of one engine before the other's turn, after one that is not counted

# Engine, or part of the split one -> batch -> milliseconds of every step.
Steps = dict[str, dict[int, list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: Gemma-3-270m")
    parser.add_argument("--dtype", default="auto", help="float32 is quicker on some machines")
    parser.add_argument("--layers", default="6:12")
    parser.add_argument("--form", default="raw", choices=("raw", "packed", "fold", "fp8"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--starts", type=int, default=4, help="how often all is started anew")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each start")
    parser.add_argument("--bursts", type=int, default=12, help="of each engine, in a round")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--logs", type=Path, default=Path("build/split-logs"))
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine is not None:
        return serve_rounds(json.loads(args.engine))
    model = str(args.model or ensure_gemma())
    console = Console()
    starts: list[Steps] = []
    for number in range(args.starts):
        starts.append(measure_start(model, args, args.logs / f"start-{number}", console))
        if args.json:
            figures = {"setting": describe(), "starts": starts}
            args.json.write_text(json.dumps(figures, indent=2) + "\n")
    report(console, starts, args)
    return None


def measure_start(model: str, args: argparse.Namespace, logs: Path, console: Console) -> Steps:
    """Everything started once."""
    with stage(model, args, logs) as address, contextlib.ExitStack() as stack:
        split = {
            "layers": args.layers,
            "stages": [address],
            "form": args.form,
            "lost_ms": 10_000,
            "replan_s": 86_400,  # steps are timed, and layers stay where they are
        }
        with console.status("starting two engines"):
            engines = {
                "whole": stack.enter_context(engine(model, args, None, logs / "whole.log")),
                "split": stack.enter_context(engine(model, args, split, logs / "split.log")),
            }
        return measure(engines, args)


@contextlib.contextmanager
def stage(model: str, args: argparse.Namespace, logs: Path) -> Iterator[str]:
    address, http_port = f"127.0.0.1:{free_port()}", free_port()
    command = [
        sys.executable, "-m", "mcp_vllm.cli.main", "stage", model, "--layers", args.layers,
        "--listen", address, "--http", f"127.0.0.1:{http_port}", "--kv-bytes", "512MiB",
        "--", "--max-model-len", str(MODEL_LEN), "--dtype", args.dtype,
    ]  # fmt: skip
    log = logs / "stage.log"
    with Server("stage", command, http_port, log, default_environment(), "/healthz") as server:
        server.wait_ready(600)
        yield address


@contextlib.contextmanager
def engine(
    model: str, args: argparse.Namespace, split: dict[str, object] | None, log: Path
) -> Iterator[subprocess.Popen[str]]:
    """This program again as an engine, which runs rounds on request; ready when this returns."""
    settings = {
        "model": model,
        "dtype": args.dtype,
        "enforce_eager": True,
        "max_model_len": MODEL_LEN,
        "max_num_seqs": 64,
        "enable_prefix_caching": False,
    }
    if split is not None:
        settings["mcp_split"] = json.dumps(split)
    environment = os.environ | default_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if split is not None:
        share_cores(environment)  # `vllm serve` does so for the process of its engine core
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__, "--engine", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    try:
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise SystemExit(f"the engine did not start: see {log}")
        yield process
    finally:
        process.kill()
        process.wait()


def serve_rounds(settings: dict[str, object]) -> None:
    """The engine's process: {"begin": requests} starts so many and ends those before; {"burst": n}
    is answered with a line of n steps' times in ms."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes to standard output, too
    from vllm import LLM

    import mcp_vllm.vllm_plugin

    mcp_vllm.vllm_plugin.register()
    engine = LLM(**settings).llm_engine
    layers = Layers(engine)
    print("ready", file=answers, flush=True)
    running: list[str] = []
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        if "begin" in asked:
            engine.abort_request(running)
            running = begin(engine, number, asked["begin"])
        times = [step(engine, layers) for _ in range(asked.get("burst", 0))]
        print(json.dumps(times), file=answers, flush=True)


class Layers:
    """Of an engine in this process.

    Attributes:
        seconds: from the first one's start to the last one's end, in the last step.
    """

    def __init__(self, engine) -> None:
        self.seconds = 0.0
        self._started = 0.0
        model = executor_of(engine).driver_worker.worker.model_runner.model
        (layers,) = (each.layers for each in model.modules() if hasattr(each, "start_layer"))
        layers[0].register_forward_pre_hook(self._start)
        layers[-1].register_forward_hook(self._end)

    def _start(self, *_) -> None:
        self._started = time.perf_counter()

    def _end(self, *_) -> None:
        self.seconds = time.perf_counter() - self._started


def executor_of(engine):
    return engine.engine_core.engine_core.model_executor


def begin(engine, number: int, batch: int) -> list[str]:
    """The names of requests that are decoding together now."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MODEL_LEN - CONTEXT, ignore_eos=True)
    names = [f"{number}-{index}" for index in range(batch)]
    for index, name in enumerate(names):
        prompt = [1000 + (number * 131 + index * 17 + i * 7) % 4000 for i in range(CONTEXT)]
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    for _ in range(1 + SKIPPED):
        engine.step()
    return names


def step(engine, layers: Layers) -> list[float]:
    """Milliseconds of a step: of all of it, of its layers, and of these, if it is split, the
    stage's and the way there and back."""
    started = time.perf_counter()
    engine.step()
    parts = [time.perf_counter() - started, layers.seconds]
    executor = executor_of(engine)
    if getattr(executor, "_link", engine) is None:
        sys.exit("the stage was lost")
    if (split := getattr(executor, "last_step", None)) is not None:
        parts += [split.stage, split.link]
    return [round(each * 1000, 3) for each in parts]


def measure(engines: dict[str, subprocess.Popen[str]], args: argparse.Namespace) -> Steps:
    """A round before those that count warms up."""
    times: Steps = {name: {batch: [] for batch in args.batches} for name in engines}
    with Progress(transient=True) as progress:
        for number in progress.track(range(args.rounds + 1), description="rounds"):
            for batch in args.batches:
                measured = measure_round(engines, batch, args.bursts if number else 1)
                for part, values in measured.items() if number else ():
                    times.setdefault(part, {each: [] for each in args.batches})
                    times[part][batch] += values
    return times


def measure_round(
    engines: dict[str, subprocess.Popen[str]], batch: int, bursts: int
) -> dict[str, list[float]]:
    """Of each engine and of its parts, `bursts` times BURST steps in ms."""
    times: dict[str, list[float]] = {}
    for name in engines:
        ask(engines[name], {"begin": batch})
    for number in range(bursts):
        for name in list(reversed(engines)) if number % 2 else list(engines):
            counted = ask(engines[name], {"burst": 1 + BURST})[1:]
            parts = (name, f"  layers, {name}", "  its stage", "  its way")
            for part, values in zip(parts, zip(*counted, strict=True), strict=False):
                times.setdefault(part, []).extend(values)
    return times


def ask(process: subprocess.Popen[str], line: dict[str, int]) -> list[list[float]]:
    print(json.dumps(line), file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


def report(console: Console, starts: list[Steps], args: argparse.Namespace) -> None:
    table = Table(
        title=f"Decode steps in ms, layers {args.layers} at a stage on loopback, form {args.form}, "
        f"{args.starts} starts of {args.rounds} rounds of {args.bursts} bursts of {BURST}"
    )
    for name in ("batch", "engine", "p10", "p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for batch in args.batches:
        for name in starts[0]:
            cuts = statistics.quantiles(of_all(starts, name, batch), n=100)
            table.add_row(str(batch), name, *(f"{cuts[p - 1]:.2f}" for p in (10, 50, 90, 99)))
    console.print(table)
    for batch in args.batches:
        for what, name in (("steps", "{}"), ("layers", "  layers, {}")):
            pairs = [
                paired(*(start[name.format(engine)][batch] for engine in ("whole", "split")))
                for start in starts
            ]
            all_of = list(itertools.chain(*pairs))
            ratio = statistics.median(split / whole for whole, split in all_of)
            low, middle, high = statistics.quantiles(split - whole for whole, split in all_of)
            by_start = [statistics.median(split - whole for whole, split in each) for each in pairs]
            console.print(
                f"batch {batch}, {what}: split / whole {ratio:.3f}, overhead {middle:.1f} ms "
                f"(quartiles {low:.1f} and {high:.1f} of {len(all_of)} pairs of bursts; "
                f"the starts' medians {', '.join(f'{each:.1f}' for each in by_start)})"
            )
    console.print(one_line())


def paired(whole: list[float], split: list[float]) -> list[tuple[float, float]]:
    """The medians of the bursts that followed one another."""
    medians = (
        [statistics.median(steps[at : at + BURST]) for at in range(0, len(steps), BURST)]
        for steps in (whole, split)
    )
    return list(zip(*medians, strict=True))


def of_all(starts: list[Steps], name: str, batch: int) -> list[float]:
    return [step for start in starts for step in start[name][batch]]


if __name__ == "__main__":
    main()
