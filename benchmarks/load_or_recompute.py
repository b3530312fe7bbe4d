"""Load or recompute on real engines: time to first token over a slow link and a fast one.

    python benchmarks/load_or_recompute.py [--model PATH] [--mbit 2] [--rounds 3] [--json F]

Two hosts on this machine (an agent and a `vllm serve` engine each); B reaches A through a proxy of
settable speed. Each round takes prompts of about 2,000 tokens. B is asked for the first token of
one that it must compute (no lookup, no load), then of prompts that A has computed: over a slow link
that B's agent has never measured, over the same once it is measured, and over a fast one. The bound
for the slow ones: computing, a tenth more, and the lookup's deadline.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from gigabit_link import running_throttles
from setting import describe, one_line

from mcp_vllm.demo.ask import Answer, ask
from mcp_vllm.demo.document import research_ship_manual
from mcp_vllm.demo.engines import HOST, free_port
from mcp_vllm.demo.pair import START_DEADLINE_S, Host
from mcp_vllm.demo.quiet import wait_until_quiet
from mcp_vllm.demo.weights import ensure_gemma

LOOKUP_MS = 100
FAST_BYTES_S = 1e9
SETTLE_DEADLINE_S = 60.0
COMPUTE, UNKNOWN, KNOWN, FAST = (
    "computed",
    "slow link, not measured yet",
    "slow link, measured",
    "fast link",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: Gemma-3-270m")
    parser.add_argument("--mbit", type=float, default=2.0, help="of the slow link")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lookup-ms", type=int, default=LOOKUP_MS)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--logs", type=Path, default=Path("build/load-or-recompute-logs"))
    args = parser.parse_args()
    slow = args.mbit * 1e6 / 8
    with tempfile.TemporaryDirectory(prefix="mcp-vllm-") as name:
        settings = [
            {
                "agent": {
                    "socket": f"{name}/{host}.sock",
                    "listen": f"{HOST}:{free_port()}",
                    "lookup_ms": args.lookup_ms,
                },
                "peers": [],
            }
            for host in "AB"
        ]
        with running_throttles([settings[0]["agent"]["listen"]], slow) as (throttle,):
            settings[1]["peers"] = [throttle.address]
            hosts = [
                Host(host, Path(name), args.logs, each)
                for host, each in zip("AB", settings, strict=True)
            ]
            try:
                for host in hosts:
                    host.start_agent()
                    host.start_engine(args.model or ensure_gemma())
                for host in hosts:
                    host.engine.wait_ready(START_DEADLINE_S)
                answers = measure(hosts, throttle, slow, args.rounds)
            finally:
                for host in hosts:
                    host.stop()
    figures = report(answers, args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(hosts: list[Host], throttle, slow: float, rounds: int) -> dict[str, list[Answer]]:
    """Case -> one answer a round. A round before them warms up."""
    a, b = hosts
    answers: dict[str, list[Answer]] = {case: [] for case in (COMPUTE, UNKNOWN, KNOWN, FAST)}
    for number in range(rounds + 1):
        prompts = {case: new_prompt() for case in answers}
        for case in (UNKNOWN, KNOWN, FAST):
            first_token(hosts, a, prompts[case])
        wait_until_encoded(a)
        for case in answers:
            if case in (UNKNOWN, FAST):
                throttle.bytes_s = slow if case == UNKNOWN else FAST_BYTES_S
                restart_agent(b)
            params = {"max_load_tokens": 0} if case == COMPUTE else None
            salt = uuid.uuid4().hex if case == COMPUTE else None
            answer = first_token(hosts, b, prompts[case], params, salt)
            print(f"round {number}, {case}: {answer.ttft_ms:.0f} ms, "
                  f"{answer.imported_tokens} tokens imported", flush=True)  # fmt: skip
            if number:
                answers[case].append(answer)
    return answers


def new_prompt() -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{uuid.uuid4()} {research_ship_manual()}"}]


def first_token(hosts, host, messages, params=None, salt=None) -> Answer:
    servers = [server for each in hosts for server in each.servers]
    wait_until_quiet(servers, SETTLE_DEADLINE_S)
    return ask(host.engine_url, messages, 1, transfer_params=params, cache_salt=salt)


def restart_agent(host: Host) -> None:
    """An agent that knows nothing of the link, with the engine connected to it."""
    host.agent.stop()
    host.start_agent()
    wait_for_health(host, lambda health: health["engines"] == 1)


def wait_until_encoded(host: Host) -> None:
    wait_for_health(host, lambda health: health["busy_requests"] == 0 == health["raw_chunks_bytes"])


def wait_for_health(host: Host, holds) -> None:
    until_s = time.monotonic() + SETTLE_DEADLINE_S
    while time.monotonic() < until_s:
        with urllib.request.urlopen(f"{host.agent_url}/healthz", timeout=30) as response:
            if holds(json.load(response)):
                return
        time.sleep(0.1)
    sys.exit(f"agent {host.name} does not come to rest")


def report(answers: dict[str, list[Answer]], args) -> dict[str, object]:
    console = Console()
    base_ms = statistics.median(answer.ttft_ms for answer in answers[COMPUTE])
    bound_ms = 1.1 * base_ms + args.lookup_ms
    table = Table(title=f"Time to first token, about 2,000 tokens; slow: {args.mbit:g} Mbit/s")
    for name in ("case", "median ms", "min", "max", "of computing", "imported tokens"):
        table.add_column(name)
    for case, found in answers.items():
        times = [answer.ttft_ms for answer in found]
        imported = statistics.median(answer.imported_tokens for answer in found)
        table.add_row(
            case,
            f"{statistics.median(times):.0f}",
            f"{min(times):.0f}",
            f"{max(times):.0f}",
            f"{statistics.median(times) / base_ms:.3f}",
            f"{imported:.0f}",
        )
    console.print(table)
    console.print(f"bound over the slow link: {bound_ms:.0f} ms")
    console.print(f"the slow link is a userspace proxy; {one_line()}")
    return {
        "setting": describe(),
        "bound_ms": bound_ms,
        "ttft_ms": {case: [a.ttft_ms for a in found] for case, found in answers.items()},
        "imported": {case: [a.imported_tokens for a in found] for case, found in answers.items()},
    }


if __name__ == "__main__":
    main()
