"""How well a link of 1 Gbit/s is used between two agents, and how well the cost model foresees it.

    python benchmarks/link_1gbit.py [--mbit 1000] [--rounds 20] [--engines] [--json F]

Two real agents, each in a network namespace of its own; `tc tbf` holds the link between them at the
rate. Where namespaces cannot be made (root and iproute2 are needed) that is said, and a proxy in
userspace takes the place of the link. Measured: the share of the link that chunks of KV take
(`raw`, so that no codec counts), and loads of what a context of 4,096 tokens of Gemma-3-270m has in
chunks, predicted against actual. The engines are simulated, memory and socket are real. With
--engines two real ones on Gemma-3-270m move contexts of about 4,000 tokens, and the first token's
time is predicted: what the load takes by the model, and what the same engine needs for the first
token when it has the context in its own host chunks.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gigabit_link import NoNetwork, ShapedLink, network_link, proxy_link
from setting import describe, one_line
from simulated import SimulatedEngine, key, until

from mcp_vllm.demo.ask import Answer, ask
from mcp_vllm.demo.document import research_ship_manual
from mcp_vllm.demo.engines import Engine, free_port
from mcp_vllm.demo.quiet import wait_until_quiet
from mcp_vllm.demo.weights import ensure_gemma
from mcp_vllm.link.prefill import PrefillCost
from mcp_vllm.link.protocol import GroupLayout

MIB = 1 << 20
THROUGHPUT_CHUNK, THROUGHPUT_CHUNKS, THROUGHPUT_ROUNDS = MIB, 160, 4
# Gemma-3-270m on the CPU: blocks of 128 tokens, three layers a group; one group keeps everything,
# five a window of 512.
TOKENS, GEMMA_CHUNK, GEMMA_WINDOWS, WINDOW_CHUNKS = 128, 3 * 128 * 2 * 256 * 2, 5, 5
CONTEXT_CHUNKS = 4096 // TOKENS
A_SLOW_ENGINE = PrefillCost(step_s=0.0, token_s=2e-3, context_s=0.0, step_tokens=2048)
PREDICTION = re.compile(r"loaded (\d+) tokens in ([\d.]+) s, predicted ([\d.]+) s")
LOG_DEADLINE_S, QUIET_DEADLINE_S = 30.0, 60.0


class Agent:
    """An agent process at one end of the link."""

    def __init__(self, place, peer, folder: Path, codec: dict[str, str], policy: str) -> None:
        self.place = place
        self.socket = folder / f"{place.listen.rpartition(':')[2]}.sock"
        self.log_path = folder / f"{self.socket.stem}.log"
        self.config_path = folder / f"{self.socket.stem}.yaml"
        agent = {
            "socket": str(self.socket),
            "listen": place.listen,
            "ram_bytes": "2GiB",
            "lookup_ms": 1000,
            "stall_ms": 5000,
            "load_ms": 60_000,
            "load_policy": policy,
        }
        settings = {"insecure": True, "agent": agent, "codec": codec, "peers": [peer.reached_at]}
        self.config_path.write_text(yaml.safe_dump(settings))

    def __enter__(self) -> "Agent":
        command = [*self.place.prefix, sys.executable, "-m", "mcp_vllm.cli.main", "agent"]
        with self.log_path.open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--config", str(self.config_path)],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "MCP_VLLM_LOG_LEVEL": "DEBUG"},
            )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            sys.exit(f"an agent did not start: {self.log_path.read_text()[-2000:]}")
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(20)

    def get(self, path: str):
        with urllib.request.urlopen(f"{self.place.url}{path}", timeout=30) as response:
            return json.load(response)

    def predictions(self) -> list[tuple[float, float]]:
        """(predicted, actual) seconds of the loads that came whole, from its log."""
        found = PREDICTION.findall(self.log_path.read_text(errors="replace"))
        return [(float(predicted), float(actual)) for _, actual, predicted in found]


@contextlib.contextmanager
def agents(link: ShapedLink, codec: dict[str, str], policy: str = "faster") -> Iterator:
    with tempfile.TemporaryDirectory(prefix="mcp-vllm-") as name:
        folder, (a, b) = Path(name), link.places
        with Agent(a, b, folder, codec, policy) as one, Agent(b, a, folder, codec, policy) as two:
            yield one, two


def knows_all(agent: Agent, peer: Agent) -> bool:
    """Whether the agent has been told of all chunks that its peer holds."""
    told = [each["chunks"] for each in agent.get("/v1/peers")["peers"]]
    return told == [peer.get("/healthz")["chunks"]]


async def throughput(link: ShapedLink) -> list[float]:
    """Payload bytes a second of each round; the first one, which measures the link, is left out."""
    groups = (GroupLayout(((0, THROUGHPUT_CHUNK),), "bf16", 256),)
    sizes = {"num_chunks": THROUGHPUT_CHUNKS, "chunk_bytes": THROUGHPUT_CHUNK, "groups": groups}
    rates = []
    with contextlib.ExitStack() as stack:
        one, two = stack.enter_context(agents(link, {"name": "raw", "wire": "raw"}, "always"))
        source = stack.enter_context(SimulatedEngine(one.socket, **sizes))
        engine = stack.enter_context(SimulatedEngine(two.socket, **sizes))
        await source.connected()
        await engine.connected()
        source.rows[:] = np.random.default_rng(0).integers(0, 256, source.rows.shape, np.uint8)
        for number in range(THROUGHPUT_ROUNDS + 1):
            names = [key(number * THROUGHPUT_CHUNKS + i) for i in range(THROUGHPUT_CHUNKS)]
            await source.store(names, range(THROUGHPUT_CHUNKS))
            await until(lambda: knows_all(two, one), "the directory")
            engine.prepare(f"r{number}")
            assert all(await engine.lookup(f"r{number}", names))
            begun_s = time.perf_counter()
            done = await engine.load(f"r{number}", names, range(THROUGHPUT_CHUNKS))
            rates.append(done.wire_bytes / (time.perf_counter() - begun_s))
            assert not done.failed
            assert done.wire_bytes > done.raw_bytes
    return rates[1:]


async def predictions(link: ShapedLink, rounds: int) -> list[tuple[float, float]]:
    """(predicted, actual) seconds of loads of a context of 4,096 tokens of Gemma."""
    groups = [GroupLayout(((0, GEMMA_CHUNK),), "bf16", 256, tokens=TOKENS, window_chunks=window)
              for window in (0, *[WINDOW_CHUNKS] * GEMMA_WINDOWS)]  # fmt: skip
    kept = [range(CONTEXT_CHUNKS), *[range(CONTEXT_CHUNKS)[-WINDOW_CHUNKS:]] * GEMMA_WINDOWS]
    places = [(group, at) for group, positions in enumerate(kept) for at in positions]
    sizes = {"num_chunks": len(places), "chunk_bytes": GEMMA_CHUNK, "groups": groups}
    with contextlib.ExitStack() as stack:
        one, two = stack.enter_context(agents(link, {"name": "lossless"}))
        source = stack.enter_context(SimulatedEngine(one.socket, **sizes))
        engine = stack.enter_context(SimulatedEngine(two.socket, **sizes))
        await source.connected()
        await engine.connected()
        for row in range(len(places)):
            source.fill(row, row)
        for number in range(rounds + 1):
            names = [key(number * CONTEXT_CHUNKS + at, group) for group, at in places]
            await source.store(names, range(len(names)))
            await until(lambda: one.get("/healthz")["raw_chunks_bytes"] == 0, "the encoder")
            await until(lambda: knows_all(two, one), "the directory")
            engine.prepare(f"r{number}", prefill=A_SLOW_ENGINE)
            first = number * CONTEXT_CHUNKS
            whole = [
                key(first + at, group)
                for group in range(len(groups))
                for at in range(CONTEXT_CHUNKS)
            ]
            present = await engine.lookup(f"r{number}", whole, whole=True)
            assert sum(present) == len(names), f"{sum(present)} of {len(names)} to be loaded"
            ends = [(at + 1) * TOKENS for _, at in places]
            done = await engine.load(f"r{number}", names, range(len(names)), ends=ends)
            assert not done.failed, done
        return two.predictions()[1:]


def first_tokens(link: ShapedLink, rounds: int, logs: Path) -> list[tuple[float, float]]:
    """(predicted, actual) seconds to the first token at B of contexts that A has computed."""
    logs.mkdir(parents=True, exist_ok=True)
    args = ("--enforce-eager", "--max-model-len", "8192", "--kv-connector", "mcp")
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    with agents(link, {"name": "lossless"}) as both, contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(
                Engine.start(
                    ensure_gemma(), free_port(), [*args, "--mcp-config", str(agent.config_path)],
                    environment, log_path=logs / f"engine-{name}.log",
                )
            )
            for name, agent in zip("AB", both, strict=True)
        ]  # fmt: skip
        for engine in engines:
            engine.wait_ready(900)
        found = []
        for number in range(rounds + 2):
            found.append(move(both, engines))
            print(
                f"round {number}: predicted {found[-1][0]:.3f} s, {found[-1][1]:.3f} s", flush=True
            )
        return found[2:]


def move(both, engines) -> tuple[float, float]:
    one, two = both
    manual = research_ship_manual()
    messages = [{"role": "user", "content": f"{uuid.uuid4()} {manual}\n\n{manual}"}]
    quiet_ask(engines, engines[0], messages)
    until_s = time.monotonic() + LOG_DEADLINE_S
    while one.get("/healthz")["raw_chunks_bytes"] and time.monotonic() < until_s:
        time.sleep(0.1)
    num_before = len(two.predictions())
    moved = quiet_ask(engines, engines[1], messages)
    if not moved.wire_bytes:
        sys.exit(f"not what was to be measured: {moved}")
    predicted_s = sum(predicted for predicted, _ in two.predictions()[num_before:])
    reset = urllib.request.Request(f"{engines[1].base_url}/reset_prefix_cache", method="POST")
    urllib.request.urlopen(reset, timeout=30).read()
    held = quiet_ask(engines, engines[1], messages)
    if held.raw_bytes or not held.imported_tokens:
        sys.exit(f"not from its own host chunks: {held}")
    return predicted_s + held.ttft_ms / 1000, moved.ttft_ms / 1000


def quiet_ask(engines, engine, messages) -> Answer:
    wait_until_quiet(engines, QUIET_DEADLINE_S)
    return ask(engine.base_url, messages, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbit", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--engines", action="store_true", help="two real engines, too")
    parser.add_argument("--proxy", action="store_true", help="do not try network namespaces")
    parser.add_argument("--logs", type=Path, default=Path("build/link-logs"))
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    console = Console()
    with contextlib.ExitStack() as stack:
        link = a_link(stack, console, args)
        figures = measure(link, args, console)
    figures["link"] = link.what
    console.print(one_line())
    if args.json:
        figures["setting"] = describe()
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def a_link(stack: contextlib.ExitStack, console: Console, args) -> ShapedLink:
    if not args.proxy:
        try:
            return stack.enter_context(network_link(args.mbit))
        except NoNetwork as error:
            console.print(f"[yellow]skipped: the shaped network link, because {error}[/]")
    return stack.enter_context(proxy_link(args.mbit))


def measure(link: ShapedLink, args, console: Console) -> dict[str, object]:
    console.print(f"link: {link.what}")
    shares = [rate / link.bytes_s for rate in asyncio.run(throughput(link))]
    console.print(
        f"useful throughput: {statistics.median(shares):.3f} of the link "
        f"(rounds: {', '.join(f'{share:.3f}' for share in shares)})"
    )
    loads = asyncio.run(predictions(link, args.rounds))
    table = Table(title="Predicted against actual")
    for name in ("what", "n", "predicted ms", "actual ms", "median error", "90th percentile"):
        table.add_column(name)
    table.add_row("load of 4,096 tokens, agent to agent", *row_of(loads))
    figures: dict[str, object] = {"shares": shares, "loads": loads}
    if args.engines:
        tokens = first_tokens(link, args.rounds, args.logs)
        table.add_row("first token of about 4,000 tokens, real engines", *row_of(tokens))
        figures["first_tokens"] = tokens
    console.print(table)
    return figures


def row_of(pairs: list[tuple[float, float]]) -> list[str]:
    errors = sorted(abs(predicted - actual) / actual for predicted, actual in pairs)
    return [
        str(len(pairs)),
        f"{1000 * statistics.median(p for p, _ in pairs):.0f}",
        f"{1000 * statistics.median(a for _, a in pairs):.0f}",
        f"{100 * statistics.median(errors):.0f} %",
        f"{100 * errors[int(0.9 * (len(errors) - 1))]:.0f} %",
    ]


if __name__ == "__main__":
    main()
