"""The stage's process: vLLM's worker with the span's layers, served to engines."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.network_utils import get_file_store_init_method
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.worker.worker_base import WorkerWrapperBase

from mcp_vllm.config.address import Address
from mcp_vllm.config.split import AUTO, StageConfig, parse_layers
from mcp_vllm.split import spans
from mcp_vllm.split.access import Access
from mcp_vllm.split.engine.cores import take_cores
from mcp_vllm.split.engine.kv_specs import encode_spec
from mcp_vllm.split.engine.layer_timer import LayerTimer
from mcp_vllm.split.engine.layers import Entry, OnlySpan
from mcp_vllm.split.engine.lease import StageLease, Turn
from mcp_vllm.split.engine.machine import free_bytes, machine_name, native_dtypes
from mcp_vllm.split.engine.middle import loading_only, middle_of_pipeline
from mcp_vllm.split.engine.slot_mapping import map_slots_alone
from mcp_vllm.split.engine.support import (
    SplitUnsupported,
    agreed_facts,
    check_supported,
    num_layers,
    warn_if_slow,
)
from mcp_vllm.split.errors import SplitError, StageRefused
from mcp_vllm.split.memory import allocatable, is_out_of_memory
from mcp_vllm.split.plan.read import read_model, stored_layer_bytes
from mcp_vllm.split.same_cores import has_cores
from mcp_vllm.split.spans import Span
from mcp_vllm.split.stage_http import serve_http
from mcp_vllm.split.stage_server import StageServer
from mcp_vllm.split.wire import About, Hello, Welcome
from mcp_vllm.telemetry.stage_metrics import StageMetrics
from mcp_vllm.vllm_plugin.fingerprint import attention_packing

logger = logging.getLogger(__name__)

# Of the free memory, where no limit is given.
_USED_SHARE = 0.7
# For a step's activations and the threads of leases, beside weights and KV blocks.
_HEADROOM_BYTES = 256 << 20


class StageModel:
    """The layers [first, end) of one model, and the leases on them.

    Attributes:
        ready: set by the process once it may serve: loaded, and in the middle of a pipeline.
    """

    def __init__(self, config: VllmConfig, stage: StageConfig) -> None:
        """Raises SplitError: this model or configuration cannot be split."""
        check_supported(config)
        self._config = config
        self._is_auto = stage.layers == AUTO
        self._span = _span_of(stage, config)
        self._plan = OnlySpan(*self._span, num_layers(config))
        self._lease_bytes = int(stage.kv_bytes) // stage.leases
        self._max_leases = stage.leases
        self._open_leases = 0
        self._lock = threading.Lock()
        self.ready = threading.Event()
        self.dtype: torch.dtype = config.model_config.dtype
        self.device: torch.device = torch.device("cpu")

    def load(self) -> None:
        """Load the layers. Raises whatever vLLM raises, or LayersUnsupported."""
        memory_bytes = free_bytes()
        self._worker = WorkerWrapperBase(rpc_rank=0)
        kwargs = {
            "vllm_config": self._config,
            "local_rank": 0,
            "rank": 0,
            "distributed_init_method": get_file_store_init_method(),
            "is_driver_worker": True,
            "shared_worker_lock": threading.Lock(),
        }
        self._worker.init_worker([kwargs])
        self._worker.init_device()
        while not self._loads():
            self._shrink()
        current_platform.update_block_size_for_backend(self._config)
        register_all_kvcache_specs(self._config)
        runner = self._worker.worker.model_runner
        self.device = runner.device
        warn_if_slow(self._config, self.device)
        with set_current_vllm_config(self._config):
            specs = self._worker.worker.get_kv_cache_spec()
        like = runner.model.make_empty_intermediate_tensors(1, self.dtype, self.device).tensors
        if not {"hidden_states"} <= set(like) <= {"hidden_states", "residual"}:
            raise SplitUnsupported(
                f"layers that hand on {', '.join(like)} cannot be split: only hidden_states and "
                "residual can travel"
            )
        self._welcome = Welcome(
            kv_specs={name: encode_spec(spec) for name, spec in specs.items()},
            kv_bytes=self._lease_bytes,
            tensors=sorted(like),
            width=like["hidden_states"].shape[-1],
            layers=spans.text(self._span),
            packing=attention_packing(),
        )
        self._about = About(
            layers=spans.text(self._span),
            machine=machine_name(),
            memory_bytes=memory_bytes,
            dtypes=native_dtypes(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
        )
        layers = self._config.compilation_config.static_forward_context
        layouts = self._worker.worker.get_supported_kv_cache_layouts()
        owner = self._plan.owner(runner.model)

        assert self._plan.layers is not None
        entry = Entry(self._plan.layers, self._plan.call)

        def choose(span: Span) -> None:
            owner.start_layer, owner.end_layer = span
            entry.place(span[0])

        self._turn = Turn({name: layers[name] for name in specs}, layouts, choose, entry)
        self._facts = agreed_facts(self._config)

    @property
    def layers(self) -> str:
        """FIRST:END that are held; fewer than planned, if memory did not suffice."""
        return spans.text(self._span)

    def facts(self) -> Mapping[str, str]:
        self.ready.wait()
        return self._facts

    def open(self, hello: Hello) -> StageLease:
        span = self._asked(hello)
        with self._lock:
            if self._open_leases >= self._max_leases:
                raise StageRefused(
                    "",
                    "busy",
                    f"all {self._max_leases} leases are taken (--leases of the stage)",
                )
            self._open_leases += 1
        timer = None
        try:
            welcome = self._welcome_to(span)
            if has_cores(hello.cores):
                map_slots_alone()
                take_cores(from_last=True).__enter__()  # for good: this thread is the lease's alone
                welcome = msgspec.structs.replace(welcome, shares_cores=True)
            if hello.measuring or hello.is_client:
                welcome = msgspec.structs.replace(welcome, about=self._about)
            if hello.measuring:
                timer = self._timer()
            return StageLease(
                self._config,
                self._make_runner,
                self._turn,
                hello,
                span,
                welcome,
                self._closed,
                timer,
            )
        except BaseException:
            self._closed()
            raise

    def _loads(self) -> bool:
        """Whether memory sufficed for the layers. Raises whatever else vLLM raises."""
        try:
            with loading_only(self._plan):
                self._worker.load_model()
            if self._is_auto:
                self._try_the_rest()
        except Exception as error:
            if not is_out_of_memory(error) or not self._is_auto:
                raise
            return False
        return True

    def _try_the_rest(self) -> None:
        """Allocate what leases will need beside the weights, and let it go again: a stage that has
        loaded as much as it can dies of its first step."""
        device = self._worker.worker.model_runner.device
        torch.empty(
            self._lease_bytes * self._max_leases + _HEADROOM_BYTES, dtype=torch.uint8, device=device
        )

    def _shrink(self) -> None:
        """Plan for fewer layers. Raises SplitError: there was one only."""
        fewer = spans.smaller(self._span)
        if fewer is None:
            raise SplitError(f"out of memory: not even layer {self._span[0]} can be loaded")
        logger.warning(
            "out of memory with layers %s: trying %s", spans.text(self._span), spans.text(fewer)
        )
        compilation = self._config.compilation_config
        compilation.static_forward_context.clear()
        compilation.static_all_moe_layers.clear()
        self._worker.worker.model_runner.model = None
        self._span = fewer
        self._plan = OnlySpan(*fewer, num_layers(self._config))
        gc.collect()

    def _asked(self, hello: Hello) -> Span:
        """The layers that the engine wants. Raises StageRefused: not all of them are here."""
        if not hello.layers:
            return self._span
        try:
            asked = parse_layers(hello.layers)
        except ValueError as error:
            raise StageRefused("", "protocol", f"layers: {str(error)[:200]}") from None
        if not spans.within(asked, self._span):
            raise StageRefused(
                "",
                "model",
                f"layers {hello.layers} are wanted, this stage holds {spans.text(self._span)}",
            )
        return asked

    def _welcome_to(self, span: Span) -> Welcome:
        """With the attention layers of `span`, and what memory there is now for their blocks."""
        specs = {
            name: spec
            for name, spec in self._welcome.kv_specs.items()
            if span[0] <= extract_layer_index(name) < span[1]
        }
        kv_bytes = min(self._lease_bytes, free_bytes())
        return msgspec.structs.replace(
            self._welcome, kv_specs=specs, kv_bytes=allocatable(kv_bytes, self.device)
        )

    def _timer(self) -> LayerTimer:
        assert self._plan.layers is not None
        return LayerTimer(self._plan.layers[slice(*self._span)], self.device)

    def _make_runner(self, config: VllmConfig) -> Any:
        """A model runner over our layers, with request states of its own."""
        loaded = self._worker.worker.model_runner
        runner = type(loaded)(config, loaded.device)
        runner.model = loaded.model
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            runner.max_num_tokens, self.dtype, self.device
        )
        return runner

    def _closed(self) -> None:
        with self._lock:
            self._open_leases -= 1


def _span_of(stage: StageConfig, config: VllmConfig) -> Span:
    """The layers to hold. Raises SplitError: memory does not suffice for one."""
    if stage.layers != AUTO:
        return parse_layers(stage.layers)
    memory_bytes = stage.memory_bytes or int(free_bytes() * _USED_SHARE)
    model = config.model_config.model
    layer_bytes = stored_layer_bytes(Path(model), num_layers(config))
    if not layer_bytes:
        layer_bytes = [each.weight_bytes for each in read_model(model).layers]
    span = spans.fitting(layer_bytes, memory_bytes - int(stage.kv_bytes))
    logger.info("layers %s fit into %d bytes, KV blocks included", spans.text(span), memory_bytes)
    return span


def engine_config(model: str, vllm_args: Sequence[str]) -> VllmConfig:
    """vLLM's configuration from its own flags. Exits with vLLM's message when they are wrong."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="mcp-vllm stage MODEL --"))
    args = parser.parse_args(["--model", model, "--enforce-eager", *vllm_args])
    args.async_scheduling = False
    return EngineArgs.from_cli_args(args).create_engine_config()


def _in_thread(load: Callable[[], None]) -> None:
    """Run `load` in a thread that ends with it. Raises what it raises.

    A thread that has computed keeps OpenMP threads of its own until it ends, and where there are
    more of these than cores libgomp's hardly spin: each operation of a step would wake one.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            load()
        except BaseException as error:
            failures.append(error)

    # A daemon, so that an interrupt need not wait for it.
    thread = threading.Thread(target=run, name="loader", daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def serve_stage(model: str, stage: StageConfig, vllm_args: Sequence[str]) -> None:
    """Load and serve until SIGTERM or SIGINT.

    Raises:
        SplitError: this model cannot be split.
        SecurityError: a certificate or key file cannot be used.
        OSError: an address cannot be had.
    """
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    access = Access(stage.security)
    metrics = StageMetrics()
    backend = StageModel(engine_config(model, vllm_args), stage)
    listen = Address.parse(stage.listen)
    server = StageServer((listen.host, listen.port), backend, access, metrics)
    if stage.http is not None:
        serve_http(Address.parse(stage.http), metrics, backend.ready.is_set)
    threading.Thread(target=server.serve, name="stage", daemon=True).start()
    _in_thread(backend.load)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    with middle_of_pipeline():
        backend.ready.set()
        logger.info(
            "stage ready: layers %s of %s at %s:%d", backend.layers, model, listen.host, server.port
        )
        stopped.wait()
        server.stop()
