"""A stage without vLLM: its layers add one to hidden states and two to the residual."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch

from mcp_vllm.config.split import SplitConfig, StageSecurity
from mcp_vllm.split.access import Access
from mcp_vllm.split.activations import Activations
from mcp_vllm.split.errors import StageRefused
from mcp_vllm.split.link import Link, Stages
from mcp_vllm.split.stage_server import StageServer, Take
from mcp_vllm.split.wire import (
    About,
    Hello,
    KvBlocks,
    KvGroup,
    KvInit,
    KvPlan,
    NewRequest,
    Step,
    Welcome,
)
from mcp_vllm.telemetry.stage_metrics import StageMetrics

WIDTH = 8
PAGE_BYTES = 64
FACTS = {"model.weights": "aaaa", "dtype": "bfloat16", "block_tokens": "16"}
SPEC = ("FullAttentionSpec", {"block_size": 16})
KV_INIT = KvInit(num_blocks=8, layout=None, groups=[KvGroup(["layers.1"], SPEC)])
HELLO = Hello(facts=FACTS, max_model_len=64, max_requests=4, max_tokens=32, form="raw")


@dataclass
class AddingLayers:
    """The backend. `during_step` runs inside each step, `loaded` opens the stage."""

    during_step: Callable[[], None] = lambda: None
    max_leases: int = 1
    layers: str = "1:3"
    facts_: Mapping[str, str] = field(default_factory=lambda: dict(FACTS))
    client_lease: Callable[[AddingLayers], AddingLease] = field(default=lambda b: PagedLease(b))
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.loaded = threading.Event()
        self.loaded.set()
        self.leases: list[AddingLease] = []
        self.measured: MeasuredLease | None = None

    def facts(self) -> Mapping[str, str]:
        self.loaded.wait()
        return self.facts_

    def open(self, hello: Hello) -> AddingLease:
        if len(self.leases) >= self.max_leases:
            raise StageRefused("", "busy", "all leases are taken")
        if hello.layers not in ("", self.layers):
            held = f"layers {hello.layers} are wanted, this stage holds {self.layers}"
            raise StageRefused("", "model", held)
        if hello.is_client:
            lease: AddingLease = self.client_lease(self)
        else:
            lease = MeasuredLease(self) if hello.measuring else AddingLease(self)
        self.leases.append(lease)
        return lease


class AddingLease:
    welcome = Welcome({"layers.1": SPEC}, 1 << 20, ["hidden_states", "residual"], WIDTH, "1:3")

    def __init__(self, backend: AddingLayers) -> None:
        self._backend = backend
        self.settled: list[Step] = []
        self.pages = np.zeros((KV_INIT.num_blocks, PAGE_BYTES), np.uint8)

    def init_kv(self, kv_init: KvInit) -> None:
        assert kv_init == KV_INIT

    def read_kv(self, wanted: KvBlocks) -> memoryview:
        if wanted.layers != ["layers.1"]:
            raise StageRefused("", "step", "no such layer")
        return memoryview(self.pages[wanted.blocks]).cast("B")

    def write_kv(self, given: KvBlocks, pages: bytearray) -> None:
        self.pages[given.blocks] = np.frombuffer(pages, np.uint8).reshape(-1, PAGE_BYTES)

    def run(self, step: Step, take: Take, computed: Callable[[], None]) -> Activations:
        order, rows = take(lambda: None)
        assert sorted(order) == sorted(alias for alias, _ in step.scheduled)
        self._backend.during_step()
        computed()
        assert rows.residual is not None
        return Activations(rows.hidden + 1, rows.residual + 2)

    def layer_seconds(self) -> list[float]:
        raise AssertionError("not a lease that measures")

    def settle(self, step: Step) -> None:
        self.settled.append(step)

    def close(self) -> None:
        self._backend.leases.remove(self)


class PagedLease(AddingLease):
    """Of a client: each token's row comes back as the sum of all rows of its request so far, which
    are read back from the blocks of two groups. So wrong blocks or positions show."""

    PLAN = KvPlan(num_blocks=25, block_tokens=[4, 8], max_model_len=40)
    welcome = msgspec.structs.replace(
        AddingLease.welcome, about=About("1:3", "made-up", 1 << 30, ["float32"], "float32")
    )

    def __init__(self, backend: AddingLayers) -> None:
        super().__init__(backend)
        self.tables: dict[int, list[list[int]]] = {}
        self.kv: dict[tuple[int, int], torch.Tensor] = {}
        self.steps: list[Step] = []

    def init_kv(self, kv_init: KvInit) -> KvPlan:
        assert kv_init == KvInit(0, None, [])
        return self.PLAN

    def run(self, step: Step, take: Take, computed: Callable[[], None]) -> Activations:
        self.steps.append(step)
        for alias in step.finished:
            del self.tables[alias]
        for new in step.new:
            assert new.alias not in self.tables
            self.tables[new.alias] = [list(ids) for ids in new.blocks]
        for each in step.continued:
            for table, ids in zip(self.tables[each.alias], each.blocks or [[], []], strict=True):
                table += ids
        self._check_blocks()
        first = {each.alias: each.num_computed for each in (*step.new, *step.continued)}
        order, rows = take(lambda: None)
        assert order == [alias for alias, _ in step.scheduled]
        self._backend.during_step()
        sums, taken = [], 0
        for alias, count in step.scheduled:
            for position in range(first[alias], first[alias] + count):
                sums.append(self._result(alias, position, rows.hidden[taken]))
                taken += 1
        result = torch.stack(sums)
        return Activations(result, torch.zeros_like(result))

    def _result(self, alias: int, position: int, row: torch.Tensor) -> torch.Tensor:
        """Write a row into both groups' blocks, and compute with what is there."""
        seen = []
        for table, size in zip(self.tables[alias], self.PLAN.block_tokens, strict=True):
            self.kv[table[position // size], position % size] = row
            so_far = [self.kv[table[i // size], i % size] for i in range(position + 1)]
            seen.append(torch.stack(so_far))
        assert torch.equal(*seen)
        return self.last_row(seen[0])

    def last_row(self, rows: torch.Tensor) -> torch.Tensor:
        """What the layers make of the last of a request's rows."""
        return rows.sum(0)

    def _check_blocks(self) -> None:
        used = [block for tables in self.tables.values() for table in tables for block in table]
        assert len(used) == len(set(used)), "a block that two sessions have"
        assert 0 < min(used) <= max(used) < self.PLAN.num_blocks


class MeasuredLease(AddingLease):
    """Of a lease that measures: keeps what it is told, and says times that were agreed on."""

    LAYER_S = (1e-6, 2e-6)
    about = About("1:3", "made-up", 1 << 30, ["float32", "bfloat16"], "bfloat16")
    welcome = msgspec.structs.replace(AddingLease.welcome, about=about)

    def __init__(self, backend: AddingLayers) -> None:
        super().__init__(backend)
        self.steps: list[Step] = []
        backend.measured = self

    def init_kv(self, kv_init: KvInit) -> None:
        self.kv_init = kv_init

    def run(self, step: Step, take: Take, computed: Callable[[], None]) -> Activations:
        self.steps.append(step)
        return super().run(step, take, computed)

    def layer_seconds(self) -> list[float]:
        return list(self.LAYER_S)


@dataclass
class RunningStage:
    address: str
    backend: AddingLayers
    metrics: StageMetrics
    server: StageServer

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"mcp_stage_{name}", labels) or 0.0


@contextlib.contextmanager
def running_stage(
    backend: AddingLayers | None = None, security: StageSecurity | None = None
) -> Iterator[RunningStage]:
    backend, metrics = backend or AddingLayers(), StageMetrics()
    server = StageServer(("127.0.0.1", 0), backend, Access(security or StageSecurity()), metrics)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield RunningStage(f"127.0.0.1:{server.port}", backend, metrics, server)
    finally:
        server.stop()
        thread.join()


def stages(
    *addresses: str, hello: Hello = HELLO, packing: str | None = None, **settings: object
) -> Stages:
    config = SplitConfig.load({"layers": "1:3", "stages": list(addresses), **settings})
    return Stages(config, hello, torch.bfloat16, packing)


def dialled(stages: Stages) -> Link:
    """A lease at the next of the stages, without waiting for it to load."""
    return stages.dial(next(stages.in_order()), (1, 3))


def leased(*addresses: str, **settings: object) -> Link:
    """A link that is ready for steps."""
    link = dialled(stages(*addresses, **settings))
    link.init_kv(KV_INIT, 5.0)
    return link


def step_of(count: int) -> Step:
    return Step([], [NewRequest(1, count, 0, [[1]])], [], [(1, count)], [], [])


def rows_of(count: int) -> Activations:
    hidden = torch.arange(count * WIDTH).view(count, WIDTH).bfloat16()
    return Activations(hidden, -hidden)


def raw_connection(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), 10)
