"""One engine's state at a stage: a vLLM model runner of its own over the shared layers.

Request states, block tables and KV blocks belong to the lease; the layers' weights to the stage.
Attention layers can be bound to one set of KV blocks at a time, so leases take turns; a lease that
waits for activations lets the others run.
"""

from __future__ import annotations

import copy
import gc
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm import forward_context
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backends.utils import record_kv_cache_layout
from vllm.v1.core.kv_cache_utils import (
    _pool_bytes_per_block,
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
)
from vllm.v1.kv_cache_interface import KVCacheGroupSpec
from vllm.v1.worker.utils import clear_layer_kv_caches

from mcp_vllm.split import wire
from mcp_vllm.split.activations import Activations
from mcp_vllm.split.engine.kv_specs import decode_group, decode_spec
from mcp_vllm.split.engine.layer_timer import LayerTimer
from mcp_vllm.split.engine.layers import Entry
from mcp_vllm.split.engine.openmp import Helpers
from mcp_vllm.split.engine.steps import Limits, StepDecoder
from mcp_vllm.split.errors import StageRefused, WireError
from mcp_vllm.split.spans import Span
from mcp_vllm.split.stage_server import Take
from mcp_vllm.split.wire import Hello, KvBlocks, KvInit, KvPlan, Step, Welcome
from mcp_vllm.vllm_plugin.layout import layer_specs
from mcp_vllm.vllm_plugin.remote_layers import Pages
from mcp_vllm.vllm_plugin.split_copies import pages_of


class Turn:
    """The stage's layers, which one lease at a time may use.

    Attributes:
        layers: vLLM's attention layers by name.
        layouts: names of the KV cache layouts that they can read, the best one first.
        entry: where activations come to the first layer.
    """

    def __init__(
        self,
        layers: dict[str, Any],
        layouts: list[str],
        choose: Callable[[Span], None],
        entry: Entry,
    ) -> None:
        """`choose` makes the model run a span of its layers, `entry` before it, and no others."""
        self.layers = layers
        self.layouts = layouts
        self.entry = entry
        self._choose = choose
        self.lock = threading.Lock()
        self._holder: object = None

    def bind(self, lease: object, span: Span, kv_caches: dict[str, Any]) -> None:
        """Let the span's layers run with these blocks; the caller holds the lock."""
        if self._holder is not lease:
            self._choose(span)
            for name, kv_cache in kv_caches.items():
                self.layers[name].kv_cache = kv_cache
            self._holder = lease

    def unbind(self, lease: object) -> None:
        """Let go of the blocks, if the layers have them; the caller holds the lock."""
        if self._holder is lease:
            clear_layer_kv_caches(self.layers.values())
            self._holder = None


class StageLease:
    """Used by one thread, the lease's."""

    def __init__(
        self,
        config: VllmConfig,
        make_runner: Callable[[VllmConfig], Any],
        turn: Turn,
        hello: Hello,
        span: Span,
        welcome: Welcome,
        on_close: Callable[[], None],
        timer: LayerTimer | None = None,
    ) -> None:
        """Raises StageRefused: the engine's batches do not fit."""
        self.welcome = welcome
        self._hello = hello
        self._span = span
        self._turn = turn
        self._on_close = on_close
        self._timer = timer
        self._config = _lease_config(config, hello)
        self._kv_caches: dict[str, Any] = {}
        self._num_blocks = 0
        self._page_bytes: dict[str, int] = {}
        self._layer_seconds: list[float] = []
        self._decoder: StepDecoder | None = None
        self._helpers = Helpers.of_this_machine() if welcome.shares_cores else Helpers()
        with turn.lock, set_current_vllm_config(self._config):
            self._runner = make_runner(self._config)

    def init_kv(self, kv_init: KvInit) -> KvPlan | None:
        layout = kv_init.layout or self._turn.layouts[0]
        if layout not in self._turn.layouts:
            raise StageRefused("", "model", f"no KV cache layout {layout[:20]!r} here")
        cache = self._config.cache_config
        record_kv_cache_layout(cache, layout)
        groups = self._own_groups() if self._hello.is_client else _decoded(kv_init)
        block_bytes = _pool_bytes_per_block(self._config, groups)
        num_blocks = kv_init.num_blocks
        if self._hello.is_client:
            num_blocks = self.welcome.kv_bytes // block_bytes
        self._check_groups(groups, num_blocks)
        cache.num_gpu_blocks = self._num_blocks = num_blocks
        cache.hash_block_size = kv_init.hash_block_size
        cache.cache_hit_alignment_tokens = kv_init.alignment
        pool_bytes = num_blocks * block_bytes
        if pool_bytes > self.welcome.kv_bytes:
            raise StageRefused(
                "",
                "memory",
                f"{num_blocks} blocks take {pool_bytes} bytes, this lease has "
                f"{self.welcome.kv_bytes}",
            )
        planned = get_kv_cache_config_from_groups(self._config, groups, pool_bytes)
        planned.kv_cache_layout = layout
        with self._turn.lock, set_current_vllm_config(self._config):
            self._turn.bind(self, self._span, {})
            self._runner.initialize_kv_cache(planned)
            if planned.needs_kv_cache_zeroing and hasattr(self._runner, "_init_kv_zero_meta"):
                self._runner._init_kv_zero_meta()
            self._page_bytes = {
                name: spec.page_size_bytes for name, spec in layer_specs(groups).items()
            }
            names = self.welcome.kv_specs
            self._kv_caches = {name: self._turn.layers[name].kv_cache for name in names}
        limits = self._limits(groups, num_blocks)
        self._decoder = StepDecoder(limits)
        if not self._hello.is_client:
            return None
        return KvPlan(num_blocks, list(limits.block_sizes), limits.max_model_len)

    @torch.inference_mode()
    def run(self, step: Step, take: Take, computed: Callable[[], None]) -> Activations:
        output = self._decode(step)
        with self._turn.lock:
            self._turn.bind(self, self._span, self._kv_caches)
            self._turn.entry.wait = rows = _Awaited(lambda: self._rows(step, take))
            try:
                result = self._runner.execute_model(output, IntermediateTensors({}))
            finally:
                self._turn.entry.wait = None
            if self._timer is not None:
                self._layer_seconds = list(self._timer.seconds)
        computed()  # others have their turn: this waits for the engine, if it does not read
        self._helpers.rest()  # until the next step's activations are there
        return rows.in_engine_order(result.tensors, step.num_tokens)

    @torch.inference_mode()
    def settle(self, step: Step) -> None:
        output = self._decode(step)
        with self._turn.lock:
            self._turn.bind(self, self._span, self._kv_caches)
            self._runner.execute_model(output)

    def read_kv(self, wanted: KvBlocks) -> memoryview:
        pages = self._pages(wanted)
        blocks = np.array(wanted.blocks)
        return memoryview(np.stack([each[blocks] for each in pages])).cast("B")

    def write_kv(self, given: KvBlocks, pages: bytearray) -> None:
        targets = self._pages(given)
        shape = len(targets), len(given.blocks), targets[0].shape[1]
        if len(pages) != math.prod(shape):
            raise _bad_blocks(f"{len(pages)} bytes for {shape[0]} layers and {shape[1]} blocks")
        blocks = np.array(given.blocks)
        for target, of_layer in zip(
            targets, np.frombuffer(pages, np.uint8).reshape(shape), strict=True
        ):
            target[blocks] = of_layer

    def _pages(self, which: KvBlocks) -> list[Pages]:
        """The layers' blocks as bytes [block, byte]. Raises StageRefused."""
        names = set(which.layers)
        is_ours = len(names) == len(which.layers) and names <= set(self._page_bytes)
        if not (which.blocks and which.layers and is_ours):
            raise _bad_blocks("no layers or blocks of this lease, or some twice")
        sizes = {self._page_bytes[each] for each in names}
        size = max(sizes) * len(which.layers) * len(which.blocks)
        if len(sizes) > 1 or size > wire.MAX_KV_BYTES:
            raise _bad_blocks(f"{size} bytes of pages, or pages of several sizes")
        if not (min(which.blocks) >= 0 and max(which.blocks) < self._num_blocks):
            raise _bad_blocks(f"a block that is not from 0 to {self._num_blocks - 1}")
        caches = [self._kv_caches[each] for each in which.layers]
        if any(each.device.type != "cpu" for each in caches):
            raise StageRefused("", "model", "KV blocks can be read where they are in host memory")
        return [pages_of(each, self._num_blocks, max(sizes)) for each in caches]

    def layer_seconds(self) -> list[float]:
        return self._layer_seconds

    def close(self) -> None:
        self._helpers.wake()
        with self._turn.lock:
            self._turn.unbind(self)
            if self._timer is not None:
                self._timer.remove()
        self._kv_caches = {}
        self._runner = None
        gc.collect()
        self._on_close()

    def _decode(self, step: Step) -> Any:
        assert self._decoder is not None
        return self._decoder.decode(step)

    def _rows(self, step: Step, take: Take) -> tuple[Activations, list[int] | None]:
        """The rows in the runner's order, and where each comes from in the engine's.

        Called by the model when it needs them. While waiting, other leases have their turn.
        """
        context = forward_context.get_forward_context()
        forward_context._forward_context = None  # or another's step would leave ours behind
        self._turn.lock.release()
        try:
            order, activations = take(self._helpers.call)
        finally:
            self._helpers.wake()
            self._turn.lock.acquire()
        self._turn.bind(self, self._span, self._kv_caches)
        forward_context._forward_context = context
        counts = dict(step.scheduled)
        if sorted(order) != sorted(counts):
            raise WireError("activations of other requests than the step's")
        ours = [int(req_id) for req_id in self._runner.input_batch.req_ids]
        if ours == order:
            return activations, None
        starts, first = {}, 0
        for alias in order:
            starts[alias] = first
            first += counts[alias]
        source = [row for each in ours for row in range(starts[each], starts[each] + counts[each])]
        residual = activations.residual
        permuted = Activations(
            activations.hidden[source], None if residual is None else residual[source]
        )
        return permuted, source

    def _own_groups(self) -> list[KVCacheGroupSpec]:
        """As vLLM groups these layers where there are no others."""
        specs = {name: decode_spec(spec) for name, spec in self.welcome.kv_specs.items()}
        return get_kv_cache_groups(self._config, specs)

    def _check_groups(self, groups: list[KVCacheGroupSpec], num_blocks: int) -> None:
        if not (0 < len(groups) <= wire.MAX_GROUPS and 0 < num_blocks < wire.MAX_BLOCKS):
            raise WireError(f"{len(groups)} KV groups of {num_blocks} blocks")
        named = sorted(name for group in groups for name in group.layer_names)
        if named != sorted(self.welcome.kv_specs):
            raise WireError("the KV groups do not have this stage's layers, each of them once")

    def _limits(self, groups: list[KVCacheGroupSpec], num_blocks: int) -> Limits:
        return Limits(
            max_tokens=self._hello.max_tokens,
            max_requests=self._hello.max_requests,
            max_model_len=self._config.model_config.max_model_len,
            num_blocks=num_blocks,
            block_sizes=tuple(group.kv_cache_spec.block_size for group in groups),
        )


class _Awaited:
    """A step's activations, which are waited for when they are asked for."""

    def __init__(self, wait: Callable[[], tuple[Activations, list[int] | None]]) -> None:
        self._wait = wait
        self._came = False
        self._source: list[int] | None = None

    def __call__(self) -> Activations:
        activations, self._source = self._wait()
        self._came = True
        return activations

    def in_engine_order(self, tensors: dict[str, torch.Tensor], num_tokens: int) -> Activations:
        """The result's rows in the order in which the engine sent them.

        Raises RuntimeError: they are not of these activations.
        """
        if not self._came:
            raise RuntimeError("the model has not called the span's first layer")
        hidden, residual = tensors["hidden_states"], tensors.get("residual")
        return Activations(
            self._unpermuted(hidden[:num_tokens]),
            None if residual is None else self._unpermuted(residual[:num_tokens]),
        )

    def _unpermuted(self, rows: torch.Tensor) -> torch.Tensor:
        if self._source is None:
            return rows
        restored = torch.empty_like(rows)
        restored[self._source] = rows
        return restored


def _bad_blocks(what: str) -> StageRefused:
    return StageRefused("", "step", f"KV blocks that cannot be: {what}")


def _decoded(kv_init: KvInit) -> list[KVCacheGroupSpec]:
    return [decode_group(each) for each in kv_init.groups]


def _lease_config(config: VllmConfig, hello: Hello) -> VllmConfig:
    """The stage's configuration with this engine's batches; layers and compilation are shared."""
    most = config.model_config.max_model_len
    if hello.max_model_len > most and not hello.is_client:
        raise StageRefused(
            "",
            "memory",
            f"--max-model-len {hello.max_model_len} is more than the stage's {most}",
        )
    lease = copy.copy(config)
    lease.model_config = copy.copy(config.model_config)
    lease.model_config.max_model_len = min(hello.max_model_len, most)
    lease.cache_config = copy.copy(config.cache_config)
    lease.scheduler_config = copy.copy(config.scheduler_config)
    lease.scheduler_config.max_num_seqs = hello.max_requests
    lease.scheduler_config.max_num_batched_tokens = hello.max_tokens
    return lease
