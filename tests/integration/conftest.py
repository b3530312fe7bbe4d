"""Real engines, shared: starting one takes half a minute and more.

One pair of hosts (A and B, each an agent and an engine, peers of each other) for each model family,
kept as long as its module runs, because two pairs do not fit a small machine's memory.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="integration tests run real vLLM engines")

from mcp_vllm.demo.pair import Pair
from mcp_vllm.demo.weights import ensure_gemma
from tests.tiny_models import write_tiny_model

REPOSITORY = Path(__file__).parents[2]
PAGE_READER = ("--worker-extension-cls", "tests.integration.page_reader.PageReader")
# Prompts longer than this are prefilled in chunks.
CHUNKED_PREFILL = ("--max-num-batched-tokens", "512")
# Two engines and two agents share a few cores here: neither the deadlines nor what is quicker must
# decide what is tested.
PATIENT = {"lookup_ms": 5000, "stall_ms": 10_000, "load_ms": 30_000, "load_policy": "always"}
SETTINGS = {"host_cache_bytes": "256MiB", "agent": {"ram_bytes": "1GiB", **PATIENT}}


@pytest.fixture(scope="session")
def log_folder() -> Path:
    return REPOSITORY / "build" / "test-logs"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory):
    """(family, seed) -> folder of a small random model, written once."""
    folders: dict[tuple[str, int], Path] = {}

    def folder(family: str, seed: int = 0) -> Path:
        if (family, seed) not in folders:
            path = tmp_path_factory.mktemp(f"{family}-{seed}")
            folders[family, seed] = write_tiny_model(family, path, seed=seed)
        return folders[family, seed]

    return folder


@pytest.fixture(scope="session")
def gemma_model() -> Path:
    """The folder of the real Gemma 3 270M, fetched once."""
    return ensure_gemma(progress=False)


def start_pair(model: Path, log_folder: Path, extra_args: Sequence[str] = ()) -> Iterator[Pair]:
    """A pair with both engines ready, chunked prefill on, and readable KV pages."""
    with Pair(log_folder, SETTINGS) as pair:
        for host in pair.hosts.values():
            host.environment = {
                "VLLM_SERVER_DEV_MODE": "1",
                "PYTHONPATH": str(REPOSITORY),
            }
        pair.start_engines(model, [*CHUNKED_PREFILL, *PAGE_READER, *extra_args])
        yield pair
