"""What `mcp-vllm plan` predicts against what split engines take, over splits, links and prompts.

    python benchmarks/split_plan.py [--models llama,gemma] [--dtype D] [--rounds 4] [--json FILE]

For each model: this machine and a stage are measured as the command measures them (the stage holds
all layers but the first and the last), each link through the stage. Then a real engine, which uses
one span of the stage's layers after the other, runs prompts of three lengths over a shaped link,
and both times are compared; a whole engine takes its turns, too. Repeated times count with their
lower quartile, measured and predicted alike, and all is run in rounds, figures are taken before and
after: other processes, and other machines on the same host, only ever make a step slower.
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
from collections.abc import Iterator
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
from mcp_vllm.split.plan.figures import Figures, LinkFigures, StepTime, typical
from mcp_vllm.split.plan.fit import LinkFit, fit_link, fit_machine
from mcp_vllm.split.plan.measure import measure_here
from mcp_vllm.split.plan.read import read_model
from mcp_vllm.split.plan.request import MeasureRequest
from mcp_vllm.split.plan.stage_probe import probe_stage
from mcp_vllm.vllm_plugin.shared_cores import share_cores
from tests.integration.split_parts import stage_of
from tests.shaped_link import ShapedLink

REPOSITORY = Path(__file__).parents[1]
BUDGET, CONTEXT = 256, 1024
ANSWER, REPEAT = 12, 1
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


# What was asked for (ttft_s, token_s) -> all seconds of it.
Samples = defaultdict[str, list[float]]


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
    parser.add_argument("--rounds", type=int, default=4, help="how often each case is measured")
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
    whole = (1, shape.num_layers - 1)
    request = MeasureRequest.of(str(model), shape.dtype, shape.num_layers, LONGEST)
    local_figures = [measure_here(request, shares_cores=True)]
    stage_figures: list[Figures] = []
    links: dict[str, LinkFit] = {}
    with stage_at(model, whole, shape.dtype) as way:
        for label, delay_s, mbit_s in LINKS:
            way.shape(delay_s, mbit_s)
            figures, transfers = probe_stage(_config(whole, way), shape, LONGEST)
            stage_figures.append(figures)
            links[label] = fit_link(transfers)
            _keep(args.keep, f"{name}-link-{len(links)}", transfers)
        way.shape(0.0, None)
        measured = _run_all(name, model, way, shape.dtype, args.rounds)
    local_figures.append(measure_here(request, shares_cores=True))
    fits = []
    for side, several in (("local", local_figures), ("cloud", stage_figures)):
        figures = _joined(several)
        _keep(args.keep, f"{name}-{side}", figures)
        fits.append(fit_machine(figures, shape, f"--{side}", as_stage=side == "cloud"))
    local, cloud = fits
    print(f"{name}: local {local}\n  cloud {cloud}\n  links {links}", flush=True)
    rows = []
    for case, samples in measured.items():
        costs = CostModel(shape, local, cloud, links[case.link])
        times, whole_times = ({what: typical(each[what]) for what in each} for each in samples)
        rows += _rows(costs, name, case, times, whole_times)
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
        options = ("--leases", "2", "--config", '{"insecure": true}', "--kv-bytes", "2GiB")
        stage = stack.enter_context(
            stage_of(model, layers, *options, vllm_args=limits, name="plan", **place)
        )
        stage.wait_ready()
        proxy = stack.enter_context(ShapedLink((stage.host, stage.port)))
        yield Way(proxy, far)


def _run_all(
    name: str, model: Path, way: Way, dtype: str, rounds: int
) -> dict[Case, tuple[Samples, Samples]]:
    """Seconds of every case, and of the whole engine beside it, in rounds: for minutes at a time a
    virtual machine may be slower."""
    samples: defaultdict[Case, tuple[Samples, Samples]]
    samples = defaultdict(lambda: (defaultdict(list), defaultdict(list)))
    config = _config(SPLITS[name][0], way).model_dump(mode="json")
    is_split = {"mcp_split": json.dumps(config)}
    with engine(model, dtype) as whole, engine(model, dtype, **is_split) as process:
        for _ in range(rounds):
            for split in SPLITS[name]:
                _tell(process, {"layers": split})
                for label, delay_s, mbit_s in LINKS:
                    way.shape(delay_s, mbit_s)
                    for prompt, batch in PROMPTS:
                        case = Case(split, label, prompt, batch)
                        _ask(process, case, samples[case][0])
                        _ask(whole, case, samples[case][1])
                way.shape(0.0, None)
    return samples


def _ask(process: subprocess.Popen[str], case: Case, samples: Samples) -> None:
    asked = {"prompt": case.prompt, "answer": ANSWER, "batch": case.batch, "repeat": REPEAT}
    for what, seconds in _tell(process, asked).items():
        samples[what] += seconds


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
    log = REPOSITORY / "build" / "test-logs" / "plan-engine.log"
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
        raise SystemExit("the engine has ended: see build/test-logs/plan-engine.log")
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
