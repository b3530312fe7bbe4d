"""What `mcp-vllm plan` predicts against what split engines take, over splits, links and prompts.

    python benchmarks/split_plan.py [--models llama,gemma] [--dtype D] [--rounds 3] [--json FILE]

For each model a real engine uses one span of the stage's layers after the other and runs prompts of
three lengths over a shaped link; a whole engine takes its turns with it, burst by burst. All is run
in rounds, and before each, this machine and a stage are measured as the command measures them (the
stage holds all layers but the first and the last), and each link through the stage: a virtual
machine may be twice as slow for seconds or minutes. Repeated times count with their lower quartile
in a round and the mean of the rounds, measured and predicted alike (a link is fitted to the
transfers of all rounds).
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from gigabit_link import FarPlace, NoNetwork, far_place
from rich.console import Console
from rich.table import Table
from setting import one_line

from mcp_vllm.config.split import SplitConfig
from mcp_vllm.demo.engines import default_environment
from mcp_vllm.demo.weights import ensure_gemma
from mcp_vllm.split.plan.cost import CostModel, Load, Split
from mcp_vllm.split.plan.figures import Figures, LinkFigures, StepTime, Transfer, typical
from mcp_vllm.split.plan.fit import fit_link, fit_machine
from mcp_vllm.split.plan.measure import measure_here
from mcp_vllm.split.plan.read import read_model
from mcp_vllm.split.plan.request import MeasureRequest
from mcp_vllm.split.plan.shape import ModelShape
from mcp_vllm.split.plan.stage_probe import probe_stage
from mcp_vllm.vllm_plugin.shared_cores import share_cores
from tests.integration.split_parts import stage_of
from tests.shaped_link import ShapedLink

REPOSITORY = Path(__file__).parents[1]
BUDGET, CONTEXT = 256, 1024
# Prompts of each case in a round, after one that warms up; bursts of an engine's decode steps, and
# the steps of each, after one that is not counted.
PROMPTS_EACH, BURSTS, BURST = 4, 4, 3
ANSWER = BURSTS * BURST
PROMPTS = ((32, 1), (200, 4), (600, 1))  # tokens, requests at once
SPLITS: dict[str, list[Split]] = {
    "llama": [(1, 2), (1, 5), (2, 6), (3, 7), (4, 6)],
    "gemma": [(1, 9), (5, 12), (12, 17)],
}
# Name, delay one way in seconds, Mbit/s each way.
LINKS = (("quick", 0.0, None), ("20 ms", 0.010, None), ("100 Mbit/s", 0.0, 100))
PATIENT = {"lost_ms": 20_000, "step_ms": 120_000, "connect_ms": 10_000, "replan_s": 0}
LONGEST = Load(max(p for p, _ in PROMPTS), ANSWER, max(b for _, b in PROMPTS), BUDGET)


class Case(NamedTuple):
    """`link` is the name of one; tokens of a prompt, requests at once."""

    split: Split
    link: str
    prompt: int
    batch: int


# What was asked for (ttft_s, token_s) -> the seconds of each round.
Samples = defaultdict[str, list[float]]


class Probes(NamedTuple):
    """What the plan is made from, of every round."""

    local: list[Figures]
    stage: list[Figures]
    links: dict[str, list[Transfer]]


@dataclass(frozen=True)
class Row:
    """One comparison, seconds; `drift`: what the whole engine beside took more than predicted."""

    model: str
    split: Split
    link: str
    prompt: int
    batch: int
    what: str
    predicted: float
    measured: float
    drift: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def error_beside(self) -> float:
        """The same, had the whole engine been predicted exactly."""
        return (self.predicted + self.drift) / self.measured - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="llama,gemma")
    parser.add_argument("--dtype", help="default: the model's; float32 is quicker on some machines")
    parser.add_argument("--rounds", type=int, default=3, help="how often each case is measured")
    parser.add_argument("--json", type=Path, help="write all cases there")
    parser.add_argument("--keep", type=Path, help="a folder: keep the figures there")
    args = parser.parse_args()
    print(one_line())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models.split(","):
            model = _llama(Path(folder)) if name == "llama" else ensure_gemma()
            rows += compare(name, model, args)
            report(rows)
    if args.json:
        args.json.write_text(
            json.dumps(
                [
                    vars(each) | {"error": each.error, "error_beside": each.error_beside}
                    for each in rows
                ]
            )
        )


def compare(name: str, model: Path, args: argparse.Namespace) -> list[Row]:
    shape = read_model(str(model), args.dtype)
    with stage_at(model, (1, shape.num_layers - 1), shape.dtype) as way:
        probes, measured = _run_all(name, model, way, shape, args.rounds)
    fits = []
    for side, several in (("local", probes.local), ("cloud", probes.stage)):
        figures = _joined(several)
        _keep(args.keep, f"{name}-{side}", figures)
        fits.append(fit_machine(figures, shape, f"--{side}", as_stage=side == "cloud"))
    local, cloud = fits
    links = {}
    for number, (label, transfers) in enumerate(probes.links.items()):
        link = LinkFigures(transfers=transfers)
        _keep(args.keep, f"{name}-link-{number}", link)
        links[label] = fit_link(link)
    print(f"{name}: local {local}\n  cloud {cloud}\n  links {links}", flush=True)
    rows = []
    for case, samples in measured.items():
        costs = CostModel(shape, local, cloud, links[case.link])
        times, beside = ({what: statistics.mean(each[what]) for what in each} for each in samples)
        rows += _rows(costs, name, case, times, beside)
    print(*map(_line, rows), sep="\n", flush=True)
    return rows


def _joined(several: list[Figures]) -> Figures:
    """Of what was measured several times on one machine, the means."""
    parts = {}
    for part in ("layers", "rest"):
        same: dict[tuple[object, ...], list[StepTime]] = defaultdict(list)
        for each in itertools.chain.from_iterable(getattr(figures, part) for figures in several):
            same[tuple(value for name, value in each if name != "seconds")].append(each)
        parts[part] = [
            times[0].model_copy(update={"seconds": statistics.mean(t.seconds for t in times)})
            for times in same.values()
        ]
    resume_s = statistics.mean(each.resume_s for each in several)
    return several[0].model_copy(update={**parts, "resume_s": resume_s})


def report(rows: list[Row]) -> None:
    table = Table(
        title="Median (worst) of |predicted / measured - 1|; *: had the whole engine, measured in "
        "turn with the split one, been predicted exactly"
    )
    for column in ("model", "link", "cases", "both", "TTFT", "a token", "TTFT *", "a token *"):
        table.add_column(column)
    for model, link in [*sorted({(each.model, each.link) for each in rows}), ("all", "")]:
        chosen = [each for each in rows if link in ("", each.link) and model in ("all", each.model)]
        errors = {"both": [abs(each.error) for each in chosen]}
        for what in ("TTFT", "token"):
            errors[what] = [abs(each.error) for each in chosen if each.what == what]
            errors[f"{what} *"] = [abs(each.error_beside) for each in chosen if each.what == what]
        cells = [
            f"{statistics.median(errors[each]):.1%} ({max(errors[each]):.0%})"
            for each in ("both", "TTFT", "token", "TTFT *", "token *")
        ]
        table.add_row(model, link, str(len(chosen)), *cells)
    Console(width=120).print(table)


@dataclass(frozen=True)
class Way:
    """To a stage: a proxy of this process that delays, and, where the machine allows it, a veth
    pair whose bandwidth the kernel bounds; else the proxy bounds that, too."""

    proxy: ShapedLink
    far: FarPlace | None

    def shape(self, delay_s: float, mbit_s: int | None) -> None:
        self.proxy.delay_s = delay_s
        if self.far is not None:
            self.far.shape(mbit_s)
        else:
            self.proxy.bytes_s = None if mbit_s is None else mbit_s * 1e6 / 8


@contextmanager
def stage_at(model: Path, split: Split, dtype: str) -> Iterator[Way]:
    with ExitStack() as stack:
        try:
            far = stack.enter_context(far_place())
            place = {"prefix": far.prefix, "host": far.host}
        except NoNetwork as reason:
            print(f"bandwidth bounded by a proxy, not by the kernel: {reason}")
            far, place = None, {}
        limits = ("--max-model-len", str(CONTEXT), "--dtype", dtype)
        layers = f"{split[0]}:{split[1]}"
        # The engine's, a probe's, and one that a link with delay has not given back yet.
        options = ("--leases", "3", "--config", '{"insecure": true}', "--kv-bytes", "2GiB")
        stage = stack.enter_context(
            stage_of(model, layers, *options, vllm_args=limits, name="plan", **place)
        )
        stage.wait_ready()
        proxy = stack.enter_context(ShapedLink((stage.host, stage.port)))
        yield Way(proxy, far)


def _run_all(
    name: str, model: Path, way: Way, shape: ModelShape, rounds: int
) -> tuple[Probes, dict[Case, tuple[Samples, Samples]]]:
    """What each round's plan would be made from, and what the split engine and the whole one took
    in every case."""
    probes = Probes([], [], defaultdict(list))
    samples: defaultdict[Case, tuple[Samples, Samples]]
    samples = defaultdict(lambda: (defaultdict(list), defaultdict(list)))
    config = _config(SPLITS[name][0], way).model_dump(mode="json")
    is_split = {"mcp_split": json.dumps(config)}
    dtype = shape.dtype
    with engine(model, dtype, **is_split) as split_engine, engine(model, dtype) as whole:
        for _ in range(rounds):
            _probe(model, way, shape, probes)
            for split in SPLITS[name]:
                _tell(split_engine, {"layers": split})
                for label, delay_s, mbit_s in LINKS:
                    way.shape(delay_s, mbit_s)
                    for prompt, batch in PROMPTS:
                        case = Case(split, label, prompt, batch)
                        _run(case, (split_engine, whole), samples[case])
                way.shape(0.0, None)
    return probes, samples


def _probe(model: Path, way: Way, shape: ModelShape, probes: Probes) -> None:
    request = MeasureRequest.of(str(model), shape.dtype, shape.num_layers, LONGEST)
    probes.local.append(measure_here(request, shares_cores=True))
    for label, delay_s, mbit_s in LINKS:
        way.shape(delay_s, mbit_s)
        figures, link = probe_stage(_config((1, shape.num_layers - 1), way), shape, LONGEST)
        probes.stage.append(figures)
        probes.links[label] += link.transfers
    way.shape(0.0, None)


def _run(case: Case, engines: Sequence[subprocess.Popen[str]], samples: Sequence[Samples]) -> None:
    """One round of it, the engines in turn."""
    times = [Samples(list) for _ in engines]
    turns = list(zip(engines, times, strict=True))
    for repeat in range(1 + PROMPTS_EACH):
        for process, seconds in turns[:: 1 if repeat % 2 else -1]:
            answer = _tell(process, {"prompt": case.prompt, "batch": case.batch})
            seconds["ttft_s"] += [answer["ttft_s"]] if repeat else []
    for burst in range(BURSTS):
        for process, seconds in turns[:: 1 if burst % 2 else -1]:
            seconds["token_s"] += _tell(process, {"steps": 1 + BURST})["token_s"][1:]
    for each, seconds in zip(samples, times, strict=True):
        for what in seconds:
            each[what].append(typical(seconds[what]))


@contextmanager
def engine(model: Path, dtype: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    arguments = {
        "model": str(model),
        "dtype": dtype,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": CONTEXT,
        "max_num_batched_tokens": BUDGET,
        "max_num_seqs": LONGEST.batch,
        "kv_cache_memory_bytes": 256 << 20,
        "skip_tokenizer_init": True,
        "async_scheduling": False,
    }
    log = REPOSITORY / "build" / "test-logs" / f"plan-engine-{'split' if more else 'whole'}.log"
    with log.open("w") as errors:
        environment = {
            **os.environ,
            **default_environment(),
            "PYTHONPATH": str(REPOSITORY),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        share_cores(environment)
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "benchmarks" / "split_plan_engine.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        try:
            _tell(process, {"engine": arguments | more})
            yield process
        finally:
            process.kill()
            process.wait()


def _tell(process: subprocess.Popen[str], line: dict[str, Any]) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(line) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit("the engine has ended: see build/test-logs/plan-engine-*.log")
    return json.loads(answer)


def _keep(folder: Path | None, name: str, figures: Figures | LinkFigures) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(figures.model_dump_json())


def _rows(
    costs: CostModel,
    model: str,
    case: Case,
    measured: dict[str, float],
    whole: dict[str, float],
) -> Iterator[Row]:
    load = Load(case.prompt, ANSWER, case.batch, BUDGET)
    for what, name, predict in (
        ("TTFT", "ttft_s", costs.ttft_s),
        ("token", "token_s", costs.token_s),
    ):
        drift = whole[name] - predict(load, None)
        yield Row(model, *case, what, predict(load, case.split), measured[name], drift)


def _line(row: Row) -> str:
    return (
        f"  {row.model} {row.split} {row.link:10} {row.prompt:4} x{row.batch} {row.what:5} "
        f"predicted {row.predicted * 1e3:8.1f} ms, measured {row.measured * 1e3:8.1f} ms, "
        f"{row.error:+.0%}, beside the whole engine {row.error_beside:+.0%}"
    )


def _config(split: Split, way: Way) -> SplitConfig:
    layers = f"{split[0]}:{split[1]}"
    return SplitConfig.load({"layers": layers, "stages": [way.proxy.address], **PATIENT})


def _llama(folder: Path) -> Path:
    """Eight random layers, wide enough that they and not Python decide."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "llama")
    return folder / "llama"


if __name__ == "__main__":
    main()
