"""vLLM's KV events with our connector: a router that keeps an index of blocks from them has the
truth, also of what came from another host."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

from mcp_vllm.demo.pair import START_DEADLINE_S, Pair
from tests.integration.conftest import SETTINGS
from tests.integration.engine_client import FLOAT32, complete
from tests.integration.prompts import prompts
from tests.waiting import wait_for

pytestmark = [pytest.mark.engine, pytest.mark.slow]
GPU, CPU = "GPU", "CPU"


class Index:
    """What a router knows of one engine: hashes of blocks, by medium, from its events alone."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.subscribe(b"")
        self.blocks: dict[str, set[tuple[int | None, object]]] = {GPU: set(), CPU: set()}
        self.num_cleared = 0
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)

    def read(self) -> "Index":
        """Take what has come."""
        while self._socket.poll(200):
            _, _, payload = self._socket.recv_multipart()
            for event in self._decoder.decode(payload).events:
                self._take(event)
        return self

    def close(self) -> None:
        self._socket.close(0)

    def _take(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        if isinstance(event, AllBlocksCleared):
            self.num_cleared += 1
            self.blocks[GPU].clear()
            return
        held = self.blocks[event.medium or GPU]
        names = {(event.group_idx, block) for block in event.block_hashes}
        if isinstance(event, BlockStored):
            held |= names
        else:
            assert names <= held, f"removed, and never stored: {len(names - held)} blocks"
            held -= names


@contextmanager
def publishing_pair(model, log_folder) -> Iterator[tuple[Pair, dict[str, Index]]]:
    with Pair(log_folder / "kv-events", SETTINGS) as pair:
        indices = {}
        for name, host in pair.hosts.items():
            host.environment = {"VLLM_SERVER_DEV_MODE": "1"}
            endpoint = f"ipc://{host.folder}/{name}.events"  # vLLM binds no address of loopback
            events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
            host.start_engine(model, [*FLOAT32, "--kv-events-config", json.dumps(events)])
            indices[name] = Index(endpoint)
        try:
            for host in pair.hosts.values():
                host.engine.wait_ready(START_DEADLINE_S)
            yield pair, indices
        finally:
            for index in indices.values():
                index.close()


def ask(pair: Pair, name: str, prompt: str):
    return complete(pair[name].engine_url, prompt, 1, params={"session_id": "events"})


def reset_prefix_cache(pair: Pair, name: str) -> None:
    url = f"{pair[name].engine_url}/reset_prefix_cache"
    urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=30).read()


def test_a_routers_index_is_right_about_computed_imported_and_cleared_blocks(
    tiny_model, log_folder
):
    with publishing_pair(tiny_model("llama"), log_folder) as (pair, indices):
        [prompt] = prompts(1, 4000)
        computed = ask(pair, "A", prompt)
        wait_for("A's blocks", lambda: indices["A"].read().blocks[GPU])
        at_a = set(indices["A"].read().blocks[GPU])
        block_tokens = len(computed.prompt_ids) // len(at_a)
        assert len(at_a) * block_tokens <= len(computed.prompt_ids) + block_tokens
        assert not indices["B"].read().blocks[GPU], "B has computed nothing"

        pair["A"].wait_until_stored("events")
        imported = ask(pair, "B", prompt)
        assert imported.params["imported_tokens"] > 0
        wait_for("B's blocks", lambda: indices["B"].read().blocks[GPU] == at_a)

        reset_prefix_cache(pair, "B")
        ask(pair, "B", prompt)  # vLLM publishes at its next step
        wait_for("the news", lambda: indices["B"].read().num_cleared)
        wait_for("the blocks again", lambda: indices["B"].read().blocks[GPU] == at_a)
        assert not (indices["A"].read().blocks[GPU] - at_a), "A was not asked"
        assert indices["B"].blocks[CPU], "the host chunks are announced, too"
