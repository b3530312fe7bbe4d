"""Time to first token of a prompt that another host has computed: import against recompute.

    python benchmarks/ttft.py [--model PATH] [--rounds 5] [--json F]

Two hosts on this machine (an agent and a `vllm serve` engine each). Each round takes a new prompt
of about 2,000 tokens: A computes it, then B is asked for its first token four times: with nothing
usable (recompute), after import from A, from its own prefix cache, and from its own host chunks
after a prefix-cache reset. The last two are floors: vLLM's own, with no agent in the path. Engines
are idle otherwise; medians; ratios hold within the run.
"""

import argparse
import json
import statistics
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from setting import describe, one_line

from mcp_vllm.demo.ask import Answer, ask
from mcp_vllm.demo.document import research_ship_manual
from mcp_vllm.demo.pair import SHARED_CORES, Host, Pair
from mcp_vllm.demo.quiet import wait_until_quiet
from mcp_vllm.demo.weights import ensure_gemma

NO_IMPORT = {"max_load_tokens": 0}
CASES = ("recompute", "import from A", "own prefix cache", "own host chunks")
SETTLE_DEADLINE_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: Gemma-3-270m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--logs", type=Path, default=Path("build/ttft-logs"))
    args = parser.parse_args()
    model = args.model or ensure_gemma()
    console = Console()
    with Pair(args.logs, SHARED_CORES) as pair:
        for host in pair.hosts.values():
            host.environment["VLLM_SERVER_DEV_MODE"] = "1"  # for /reset_prefix_cache
        with console.status("starting two engines"):
            pair.start_engines(model)
        measured = measure(pair, args.rounds)
    report(console, measured)
    if args.json:
        args.json.write_text(json.dumps({"setting": describe(), "ms": measured}, indent=2) + "\n")


def measure(pair: Pair, rounds: int) -> dict[str, list[float]]:
    """Milliseconds to the first token: case -> one figure a round. A round before them warms up."""
    a, b = pair["A"], pair["B"]
    times: dict[str, list[float]] = {case: [] for case in CASES}
    with Progress(transient=True) as progress:
        for number in progress.track(range(rounds + 1), description="rounds"):
            messages = [{"role": "user", "content": f"{uuid.uuid4()} {research_ship_manual()}"}]
            first_token(pair, a, messages)
            wait_until_idle(a)
            row = {
                "recompute": first_token(pair, b, messages, NO_IMPORT, salt=uuid.uuid4().hex),
                "import from A": expect(first_token(pair, b, messages), lambda x: x.wire_bytes > 0),
                "own prefix cache": first_token(pair, b, messages, NO_IMPORT),
            }
            reset_prefix_cache(b)
            row["own host chunks"] = expect(
                first_token(pair, b, messages), lambda x: x.imported_tokens > 0 == x.raw_bytes
            )
            wait_until_idle(b)
            if number:
                for case, answer in row.items():
                    times[case].append(round(answer.ttft_ms, 1))
    return times


def first_token(
    pair: Pair,
    host: Host,
    messages: list[dict[str, str]],
    params: dict[str, int] | None = None,
    salt: str | None = None,
) -> Answer:
    wait_until_quiet(pair.servers, SETTLE_DEADLINE_S)
    return ask(host.engine.base_url, messages, 1, transfer_params=params, cache_salt=salt)


def expect(answer: Answer, holds: Callable[[Answer], bool]) -> Answer:
    """The answer, if it is of the kind that is to be measured."""
    if not holds(answer):
        sys.exit(f"not what was to be measured: {answer}")
    return answer


def reset_prefix_cache(host: Host) -> None:
    request = urllib.request.Request(f"{host.engine.base_url}/reset_prefix_cache", method="POST")
    urllib.request.urlopen(request, timeout=30).read()


def wait_until_idle(host: Host) -> None:
    """Until the host's agent has stored and encoded everything."""
    until_s = time.monotonic() + SETTLE_DEADLINE_S
    while time.monotonic() < until_s:
        with urllib.request.urlopen(f"{host.agent_url}/healthz", timeout=30) as response:
            health = json.load(response)
        if health["busy_requests"] == 0 and health["raw_chunks_bytes"] == 0:
            return
        time.sleep(0.1)
    sys.exit(f"agent {host.name} does not come to rest")


def report(console: Console, measured: dict[str, list[float]]) -> None:
    base = statistics.median(measured["recompute"])
    table = Table(title="Time to first token, about 2,000 prompt tokens")
    table.add_column("case")
    for name in ("median ms", "min", "max", "of recompute"):
        table.add_column(name, justify="right")
    for case, times in measured.items():
        median = statistics.median(times)
        figures = (
            f"{median:.0f}",
            f"{min(times):.0f}",
            f"{max(times):.0f}",
            f"{median / base:.3f}",
        )
        table.add_row(case, *figures)
    console.print(table)
    console.print(one_line())


if __name__ == "__main__":
    main()
