"""What the connector costs when nothing hits: output throughput of unique prompts with and without.

    python benchmarks/overhead.py [--model PATH] [--rounds 15] [--json F]

Two engines on this machine, one plain, one with `--kv-connector mcp` and its own agent. Short
rounds of unique prompts go to them in turn (plain, mcp, mcp, plain, ...), so that what else changes
on the machine changes for both; the figure is the ratio of the medians. The other engine is idle.
"""

import argparse
import json
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from setting import describe, one_line

from mcp_vllm.demo.ask import client_of
from mcp_vllm.demo.engines import Engine, free_port
from mcp_vllm.demo.pair import ENGINE_ARGS, START_DEADLINE_S
from mcp_vllm.demo.weights import ensure_gemma

WORDS = ("anchor", "ballast", "current", "depth", "engine", "fathom", "gauge", "harbour", "island",
         "jetty", "keel", "ledger", "mast", "needle", "ocean", "pump", "quay", "rudder", "sonar",
         "tide", "vessel", "winch", "yard", "zenith")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: Gemma-3-270m")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=8, help="requests a round")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--prompt-words", type=int, default=400)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--logs", type=Path, default=Path("build/overhead-logs"))
    args = parser.parse_args()
    model = args.model or ensure_gemma()
    console = Console()
    ours = ("--kv-connector", "mcp", "--mcp-config", '{"agent": {"listen": "127.0.0.1:0"}}')
    with (
        start(model, "plain", (), args.logs) as plain,
        start(model, "mcp", ours, args.logs) as mcp,
    ):
        with console.status("starting two engines"):
            for engine in (plain, mcp):
                engine.wait_ready(START_DEADLINE_S)
        rates = measure({"plain": plain, "mcp": mcp}, args)
    report(console, rates, args)
    if args.json:
        args.json.write_text(
            json.dumps({"setting": describe(), "tokens_s": rates}, indent=2) + "\n"
        )


def start(model: str | Path, name: str, extra: tuple[str, ...], logs: Path) -> Engine:
    log_path = logs / f"engine-{name}.log"
    return Engine.start(model, free_port(), [*ENGINE_ARGS, *extra], log_path=log_path)


def measure(engines: dict[str, Engine], args: argparse.Namespace) -> dict[str, list[float]]:
    """Output tokens a second: engine -> one figure a round. A round before them warms up."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    with Progress(transient=True) as progress:
        for number in progress.track(range(args.rounds + 1), description="rounds"):
            names = list(engines) if number % 2 else list(reversed(engines))
            for name in names:
                rate = run_round(engines[name], args)
                if number:
                    rates[name].append(round(rate, 2))
    return rates


def run_round(engine: Engine, args: argparse.Namespace) -> float:
    client = client_of(engine.base_url)
    model = client.models.list().data[0].id

    def request(_: int) -> None:
        prompt = " ".join(random.choices(WORDS, k=args.prompt_words))
        client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=args.output_tokens,
            temperature=0,
            extra_body={"ignore_eos": True},
        )

    started_s = time.perf_counter()
    with ThreadPoolExecutor(args.concurrency) as pool:
        list(pool.map(request, range(args.requests)))
    return args.requests * args.output_tokens / (time.perf_counter() - started_s)


def report(console: Console, rates: dict[str, list[float]], args: argparse.Namespace) -> None:
    table = Table(
        title=f"Output throughput, {args.requests} unique prompts of {args.prompt_words} words a "
        f"round, {args.output_tokens} tokens out, {args.concurrency} at once"
    )
    table.add_column("engine")
    for name in ("median tokens/s", "min", "max"):
        table.add_column(name, justify="right")
    for name, values in rates.items():
        median = statistics.median(values)
        table.add_row(name, f"{median:.1f}", f"{min(values):.1f}", f"{max(values):.1f}")
    console.print(table)
    ratio = statistics.median(rates["mcp"]) / statistics.median(rates["plain"])
    console.print(f"with the connector / without: {ratio:.3f} (ratio of medians)")
    console.print(one_line())


if __name__ == "__main__":
    main()
