"""Prefill tokens that the host cache saves on real engines: SmartCache against vLLM's own LRU.

    python benchmarks/eviction_live.py [--requests 800] [--json F]

Two engines with connector `mcp` on this machine, equal but for `host_cache_policy`. Every request
goes to both, one at a time, to the one and the other first in turn. What counts are the prompt
tokens that an engine did not compute because its host cache had them, as each response says.

The load is `chat_load.py`'s, with its defaults: 24 open chats over 3 system prompts, returns by
Zipf's law with exponent 0.8, eight turns a chat, two requests in five prompts that never come back.
The working set, that is what the open chats have said so far, is three times the host cache. It was
chosen before the first run on an engine, and not changed for the result.

So that the host cache is what is measured, the engine's own KV cache holds little more than one
request, and the agent's store the least that it can be given (1 MiB: less than five chunks); tokens
that came from there are shown. Time is compressed: a chat comes back after seconds, not minutes.
The model is a small random one of the Llama family, whose tokens are characters.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from chat_load import ChatLoad
from setting import describe, one_line

from mcp_vllm.demo.engines import Engine, free_port
from mcp_vllm.demo.pair import START_DEADLINE_S
from tests.tiny_models import write_tiny_model

POLICIES = ("lru", "smart")
BLOCK_TOKENS = 128
# Four layers, keys and values, two heads of 64, bfloat16.
CHUNK_BYTES = BLOCK_TOKENS * 4 * 2 * 2 * 64 * 2
MAX_TOKENS = 2048
WORKING_SETS = 3
TARGET = 1.2


@dataclass
class Saved:
    """Of one engine: prompt tokens, and those of them that came from the host cache, or the agent's
    store; seconds that its requests took."""

    prompt: int = 0
    host: int = 0
    agent: int = 0
    seconds: float = 0.0

    def ask(self, engine: Engine, client: httpx.Client, prompt: str) -> None:
        started_s = time.perf_counter()
        response = client.post(
            f"{engine.base_url}/v1/completions",
            json={"prompt": prompt, "max_tokens": 1, "temperature": 0},
        )
        response.raise_for_status()
        self.seconds += time.perf_counter() - started_s
        answer = response.json()
        params = answer["kv_transfer_params"]
        self.prompt += answer["usage"]["prompt_tokens"]
        if params["imported_from"] == ["host"]:
            self.host += params["imported_tokens"]
        else:
            self.agent += params["imported_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--logs", type=Path, default=Path("build/eviction-logs"))
    args = parser.parse_args()
    load = ChatLoad(args.requests, seed=args.seed)
    working_set = load.open_chats * load.mean_chat_chars / BLOCK_TOKENS
    num_chunks = round(working_set / WORKING_SETS)
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model("llama", Path(folder))
        saved = measure(model, load, num_chunks, args.logs)
    report(Console(), saved, load, working_set, num_chunks)
    if args.json:
        figures = {name: vars(each) for name, each in saved.items()}
        setting = {**describe(), "chunks": num_chunks, "working_set": working_set, **vars(load)}
        args.json.write_text(json.dumps({"setting": setting, "saved": figures}, indent=2) + "\n")


def measure(model: Path, load: ChatLoad, num_chunks: int, logs: Path) -> dict[str, Saved]:
    saved = {name: Saved() for name in POLICIES}
    with (
        start(model, "lru", num_chunks, logs) as lru,
        start(model, "smart", num_chunks, logs) as smart,
        httpx.Client(timeout=600) as client,
        Progress(transient=True) as progress,
    ):
        engines = {"lru": lru, "smart": smart}
        for name, engine in engines.items():
            engine.wait_ready(START_DEADLINE_S)
            check_size(logs / f"engine-{name}.log", num_chunks)
        requests = progress.track(load.requests(), load.num_requests, description="requests")
        for number, (_, prompt) in enumerate(requests):
            for name in POLICIES if number % 2 else reversed(POLICIES):
                saved[name].ask(engines[name], client, prompt)
    return saved


def start(model: Path, policy: str, num_chunks: int, logs: Path) -> Engine:
    config = {
        "host_cache_bytes": num_chunks * CHUNK_BYTES,
        "host_cache_policy": policy,
        "agent": {"listen": "127.0.0.1:0", "ram_bytes": "1MiB"},
    }
    blocks = MAX_TOKENS // BLOCK_TOKENS + 2
    options = [
        "--enforce-eager",
        "--max-model-len",
        str(MAX_TOKENS),
        "--num-gpu-blocks-override",
        str(blocks),
        "--kv-connector",
        "mcp",
        "--mcp-config",
        json.dumps(config),
    ]
    return Engine.start(model, free_port(), options, log_path=logs / f"engine-{policy}.log")


def check_size(log: Path, num_chunks: int) -> None:
    """Whether the engine has as many host chunks as were meant for it."""
    found = re.search(r"primary tier \((\w+), (\d+) chunks\)", log.read_text())
    if found is None or int(found[2]) != num_chunks:
        raise SystemExit(f"{log}: expected {num_chunks} host chunks, found {found and found[0]}")


def report(
    console: Console, saved: dict[str, Saved], load: ChatLoad, working_set: float, num_chunks: int
) -> None:
    table = Table(
        title=f"{load.num_requests} requests, working set {working_set:.0f} chunks of "
        f"{BLOCK_TOKENS} tokens, host cache {num_chunks}, seed {load.seed}"
    )
    for name in ("policy", "prompt tokens", "from host cache", "share", "from agent", "seconds"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for name, each in saved.items():
        table.add_row(
            name, f"{each.prompt:,}", f"{each.host:,}", f"{each.host / each.prompt:.1%}",
            f"{each.agent:,}", f"{each.seconds:.0f}",
        )  # fmt: skip
    console.print(table)
    ratio = saved["smart"].host / max(1, saved["lru"].host)
    console.print(f"saved by SmartCache / by LRU: {ratio:.3f} (aim {TARGET})")
    console.print(one_line())


if __name__ == "__main__":
    main()
