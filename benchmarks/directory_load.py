"""Lookups of many requests at once: of chunks held here, and of chunks that peers hold.

    python benchmarks/directory_load.py [--sessions 2000] [--requests 200] [--peers 3] [--json F]

Real agents in processes of their own, connected by real sockets; engines are their end of the link
alone (no vLLM). The sessions are stored round robin at all agents, which have room for half of
them. Then that many requests run at once at the first agent, each for a session chosen at random:
its lookup is timed from the question to the answer, in the engine's process; a part of them loads
chunks, whose bytes are compared; it stays for a while (a second on average), ends, and another one
begins. `burst` asks for all requests in one write: the last answer has waited for all others.
Beside them: what a lookup costs that asks a peer over the network, in an idle moment; and, while
the requests run, what an empty question to an idle process costs: what others use of the machine is
in all figures.
"""

import argparse
import asyncio
import contextlib
import functools
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

import empty_round_trip
from async_engine import FIELDS, AsyncEngine
from setting import describe, one_line

from mcp_vllm.agent import wire
from mcp_vllm.config import Config
from mcp_vllm.demo.engines import free_port
from mcp_vllm.link import protocol
from mcp_vllm.session.fingerprint import Fingerprint

# Of a request's life, which an engine would spend with prefill and decoding.
LIFE_S = (0.5, 1.5)
LOADING_SHARE = 0.2
LOADED_CHUNKS = 2
NETWORK_LOOKUPS = 200
BURSTS = 20
SETTLE_S = 60.0


@dataclass
class Load:
    """What is run: see the arguments."""

    sessions: int
    requests: int
    peers: int
    chunks: int
    chunk_kib: int
    seconds: float

    @property
    def ram_bytes(self) -> int:
        """Of each agent: half of the sessions fit into all of them together."""
        total = self.sessions * self.chunks * (self.chunk_kib << 10)
        return max(4 << 20, total // (2 * (self.peers + 1)))

    def chain(self, session: int) -> list[bytes]:
        return [
            (session << 16 | position).to_bytes(32, "little") + bytes(4)
            for position in range(self.chunks)
        ]


@dataclass
class Outcome:
    """Milliseconds of lookups by who had the chunks, microseconds of the agent's processor time for
    each, and what went wrong."""

    lookups_ms: dict[str, list[float]] = field(default_factory=dict)
    cpu_us: dict[str, float] = field(default_factory=dict)
    loads: int = 0
    loaded_chunks: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, seconds: float) -> None:
        self.lookups_ms.setdefault(kind, []).append(1000 * seconds)


class AgentUnderLoad:
    """One agent process and its engine."""

    def __init__(self, folder: Path, port: int, ports: Sequence[int], load: Load) -> None:
        self.address = f"127.0.0.1:{port}"
        self.ram_bytes = load.ram_bytes
        config = Config.model_validate(
            {
                "peers": [f"127.0.0.1:{each}" for each in ports if each != port],
                "codec": {"name": "raw"},
                "agent": {
                    "listen": self.address,
                    "ram_bytes": load.ram_bytes,
                    "landing_bytes": 64 << 20,
                },
            }
        )
        path = folder / f"{port}.sock"
        environment = {**os.environ, "MCP_VLLM_CONFIG_JSON": config.to_json()}
        environment["MCP_VLLM_LOG_LEVEL"] = "WARNING"
        command = [sys.executable, "-m", "mcp_vllm.agent", "--socket", str(path)]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.engine = AsyncEngine(path, load.chunk_kib << 10)

    @property
    def rss_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @property
    def cpu_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    async def get(self, path: str) -> dict:
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"http://{self.address}{path}") as response,
        ):
            return await response.json()


@contextlib.contextmanager
def agents_under(load: Load, folder: Path) -> Iterator[list[AgentUnderLoad]]:
    ports = [free_port() for _ in range(load.peers + 1)]
    agents: list[AgentUnderLoad] = []
    try:
        agents.extend(AgentUnderLoad(folder, port, ports, load) for port in ports)
        yield agents
    finally:
        for agent in agents:
            agent.process.terminate()
        for agent in agents:
            agent.process.wait()


async def fill(agents: Sequence[AgentUnderLoad], load: Load) -> None:
    """Session s is stored, and recorded, at agent s modulo their number."""

    async def fill_one(which: int) -> None:
        engine = agents[which].engine
        await engine.connect()
        for session in range(which, load.sessions, len(agents)):
            chain, request_id = load.chain(session), f"fill {session}"
            engine.send(protocol.Prepare(request_id, "default", f"session {session}"))
            await engine.store(chain)
            engine.send(protocol.Finish(request_id, [chain], 16 * load.chunks))

    await asyncio.gather(*(fill_one(which) for which in range(len(agents))))


async def settled(agents: Sequence[AgentUnderLoad]) -> None:
    """Until the first agent knows all that its peers hold, and nobody has chunks to encode."""
    until_s = time.monotonic() + SETTLE_S
    while True:
        health = {agent.address: await agent.get("/healthz") for agent in agents}
        raw_bytes = sum(each["raw_chunks_bytes"] for each in health.values())
        held = {agent.address: health[agent.address]["chunks"] for agent in agents[1:]}
        known = (await agents[0].get("/v1/peers"))["peers"]
        if not raw_bytes and held == {each["name"]: each["chunks"] for each in known}:
            return
        if time.monotonic() > until_s:
            raise SystemExit(f"after {SETTLE_S:g} s the directories say {known}, held are {held}")
        await asyncio.sleep(0.1)


async def kinds_of(agents: Sequence[AgentUnderLoad], load: Load) -> dict[str, list[int]]:
    """Sessions by who holds them whole: this agent, a peer, or nobody."""
    kinds: dict[str, list[int]] = {"here": [], "at a peer": [], "nowhere": []}
    engine = agents[0].engine
    engine.send(protocol.Prepare("kinds", "default", None))
    own = set(range(0, load.sessions, len(agents)))
    for session in range(load.sessions):
        present, _ = await engine.lookup("kinds", load.chain(session))
        if all(present):
            kinds["here" if session in own else "at a peer"].append(session)
        elif not any(present):
            kinds["nowhere"].append(session)
    return kinds


async def run_requests(
    engine: AsyncEngine, load: Load, kinds: dict[str, list[int]], outcome: Outcome
) -> None:
    """`load.requests` at once, for `load.seconds`."""
    dice = random.Random(1)
    choices = [(kind, session) for kind, those in kinds.items() for session in those]
    until_s = time.monotonic() + load.seconds

    async def one_after_the_other(number: int) -> None:
        await asyncio.sleep(dice.uniform(0, LIFE_S[1]))
        turn = 0
        while time.monotonic() < until_s:
            turn += 1
            request_id = f"{number} {turn}"
            kind, session = dice.choice(choices)
            chain = load.chain(session)
            engine.send(protocol.Prepare(request_id, "default", f"session {session}"))
            present, seconds = await engine.lookup(request_id, chain)
            if turn > 1:  # warm
                outcome.note(kind, seconds)
            wanted = [key for key, has in zip(chain, present, strict=True) if has]
            if wanted and dice.random() < LOADING_SHARE:
                loaded = await engine.load(request_id, wanted[:LOADED_CHUNKS])
                outcome.loads += 1
                outcome.loaded_chunks += len(wanted[:LOADED_CHUNKS]) - len(loaded.failed)
            await asyncio.sleep(dice.uniform(*LIFE_S))
            engine.send(protocol.Finish(request_id, [chain], 16 * load.chunks))

    tasks = [asyncio.create_task(one_after_the_other(n)) for n in range(load.requests)]
    for task in asyncio.as_completed(tasks):
        try:
            await task
        except Exception as error:
            outcome.errors[repr(error)[:100]] += 1


async def run_bursts(
    agent: AgentUnderLoad, load: Load, kinds: dict[str, list[int]], outcome: Outcome
) -> None:
    """All requests' lookups in one write, a few times, for those held here and at peers."""
    engine, dice = agent.engine, random.Random(2)
    for kind in ("here", "at a peer"):
        before_s = agent.cpu_s
        for round_ in range(BURSTS):
            ids = [f"burst {kind} {round_} {number}" for number in range(load.requests)]
            engine.send(*(protocol.Prepare(each, "default", None) for each in ids))
            asked = [(each, load.chain(dice.choice(kinds[kind]))) for each in ids]
            for _, seconds in await engine.lookups(asked):
                outcome.note(f"{kind}, burst", seconds)
            engine.send(*(protocol.Finish(each, [], 0) for each in ids))
            await asyncio.sleep(0.1)
        outcome.cpu_us[kind] = 1e6 * (agent.cpu_s - before_s) / (BURSTS * load.requests)


async def run_over_the_network(agent: AgentUnderLoad, load: Load, outcome: Outcome) -> None:
    """What each lookup would cost without directories, to one peer on a warm connection."""
    namespace = Fingerprint(FIELDS).digest
    async with aiohttp.ClientSession() as http:
        for number in range(NETWORK_LOOKUPS):
            keys = load.chain(number % load.sessions)
            body = wire.encode(wire.LookupRequest(wire.WIRE_VERSION, namespace, keys))
            begun_s = time.perf_counter()
            async with http.post(f"http://{agent.address}/v1/blocks/lookup", data=body) as response:
                await response.read()
            outcome.note("asked over the network, idle", time.perf_counter() - begun_s)


async def measure(load: Load, console: Console) -> dict:
    """Run it all; returns what is printed."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder, agents_under(load, Path(folder)) as agents:
        console.print(f"storing {load.sessions} sessions at {len(agents)} agents ...")
        await fill(agents, load)
        await settled(agents)
        kinds = await kinds_of(agents, load)
        console.print("held: " + ", ".join(f"{k} {len(v)}" for k, v in kinds.items()))
        if not kinds["here"] or not kinds["at a peer"]:
            raise SystemExit("nothing is held here, or at peers: give more sessions")
        engine = agents[0].engine
        await run_over_the_network(agents[1], load, outcome)
        await run_bursts(agents[0], load, kinds, outcome)
        console.print(f"{load.requests} requests at once for {load.seconds:g} s ...")
        empty = functools.partial(outcome.note, "an empty question to an idle process")
        async with empty_round_trip.measured(Path(folder), empty):
            await run_requests(engine, load, kinds, outcome)
        health = [await agent.get("/healthz") for agent in agents]
        peers = (await agents[0].get("/v1/peers"))["peers"]
        memory = [agent.rss_bytes for agent in agents]
        for agent in agents:
            await agent.engine.close()
    return {
        "load": vars(load) | {"ram_bytes": load.ram_bytes},
        "lookups": {kind: _figures(each) for kind, each in outcome.lookups_ms.items()},
        "cpu_us": {kind: round(each, 1) for kind, each in outcome.cpu_us.items()},
        "loads": outcome.loads,
        "loaded_chunks": outcome.loaded_chunks,
        "failed_chunks": engine.failed,
        "wrong_chunks": engine.wrong,
        "errors": dict(outcome.errors),
        "down": [each["name"] for each in peers if each["directory"] != "synced"],
        "held_bytes": [each["held_bytes"] for each in health],
        "rss_bytes": memory,
        "directory_chunks": sum(each["chunks"] for each in peers),
    }


def _figures(milliseconds: list[float]) -> dict[str, float]:
    ranked = sorted(milliseconds)

    def at(share: float) -> float:
        return round(ranked[min(len(ranked) - 1, int(share * len(ranked)))], 3)

    return {"count": len(ranked), "p50": at(0.5), "p99": at(0.99), "max": round(ranked[-1], 3)}


def show(report: dict, console: Console) -> None:
    table = Table(title="Lookups, milliseconds")
    for title in ("chunks", "count", "P50", "P99", "max"):
        table.add_column(title, justify="left" if title == "chunks" else "right")
    for kind, figures in report["lookups"].items():
        table.add_row(kind, *(f"{value:,.10g}" for value in figures.values()))
    console.print(table)
    cpu = ", ".join(f"{kind} {each:,.0f}" for kind, each in report["cpu_us"].items())
    console.print(f"the agent's processor time a lookup in the bursts, microseconds: {cpu}")
    budget = report["load"]["ram_bytes"]
    held = ", ".join(f"{each / budget:.3f}" for each in report["held_bytes"])
    console.print(f"held, of the budget of {budget >> 20} MiB: {held}")
    rss = ", ".join(f"{each >> 20}" for each in report["rss_bytes"])
    console.print(f"resident memory of the agents, MiB: {rss}")
    console.print(f"chunks that the first agent knows of at peers: {report['directory_chunks']:,}")
    console.print(
        f"{report['loads']} loads, {report['loaded_chunks']} chunks; not brought: "
        f"{report['failed_chunks'] or 'none'}; wrong bytes: {report['wrong_chunks']}; errors: "
        f"{report['errors'] or 'none'}; peers lost: {report['down'] or 'none'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=200, help="at once")
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=16, help="of a session")
    parser.add_argument("--chunk-kib", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--json", type=Path, help="write the report there, too")
    args = parser.parse_args()
    console = Console()
    load = Load(args.sessions, args.requests, args.peers, args.chunks, args.chunk_kib, args.seconds)
    console.print(one_line())
    console.print(f"load average before: {os.getloadavg()[0]:.1f}")
    gc.freeze()  # latencies are measured in this process
    report = asyncio.run(measure(load, console))
    load_average = {"load average": f"{os.getloadavg()[0]:.1f}"}
    console.print(f"load average after: {load_average['load average']} (1 minute)")
    show(report, console)
    if args.json:
        args.json.write_text(json.dumps({**report, "setting": describe() | load_average}, indent=1))
    if report["errors"] or report["wrong_chunks"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
