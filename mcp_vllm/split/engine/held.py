"""The layers that the engine holds itself, and their KV blocks: both can change between steps.

Layers that come are loaded as a stage loads them and put in the places that the engine's model
keeps for them; those that go leave a gate and empty places behind. Then the worker's KV blocks are
allocated anew, as many as before, for all layers that are here. Request states, sampling states
included, stay; what the blocks held does not.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.kv_cache_utils import (
    _pool_bytes_per_block,
    _project_kv_cache_groups_to_worker,
    get_kv_cache_config_from_groups,
)
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.worker.utils import clear_layer_kv_caches

from mcp_vllm.split.engine.kv_specs import encode_group, encode_spec, in_dtype
from mcp_vllm.split.engine.layers import AllButSpan, OnlySpan
from mcp_vllm.split.engine.machine import free_bytes
from mcp_vllm.split.engine.middle import loading_only
from mcp_vllm.split.engine.support import num_layers
from mcp_vllm.split.errors import SplitError
from mcp_vllm.split.memory import is_out_of_memory
from mcp_vllm.split.plan.read import stored_layer_bytes
from mcp_vllm.split.spans import Span
from mcp_vllm.split.wire import KvInit, KvSpec
from mcp_vllm.vllm_plugin.layout import layer_specs

logger = logging.getLogger(__name__)

# Of the free memory, when layers come without need.
_USED_SHARE = 0.7


class HeldLayers:
    """Owned by the executor.

    Attributes:
        span: the layers that are elsewhere; None: all are here.
    """

    def __init__(
        self,
        config: VllmConfig,
        plan: AllButSpan,
        worker: Any,
        parts: list[KVCacheConfig],
        stage_dtype: torch.dtype,
    ) -> None:
        """`parts` are the KV configurations of the worker and of the stage, both in our dtype."""
        self._config = config
        self._plan = plan
        self._worker = worker
        local, remote = parts
        self._kv = local
        self._stage_dtype = stage_dtype
        self._weights = stored_layer_bytes(Path(config.model_config.model), num_layers(config))
        self._groups = [
            _merged(*pair)
            for pair in zip(local.kv_cache_groups, remote.kv_cache_groups, strict=True)
        ]
        self.span: Span | None = (plan.first, plan.end)

    def kv_init(self, span: Span) -> KvInit:
        """What a stage with these layers is told."""
        return KvInit(
            num_blocks=self._kv.num_blocks,
            layout=self._kv.kv_cache_layout,
            groups=[
                encode_group(self._at_stage(each)) for each in self._projected(span, inside=True)
            ],
            hash_block_size=self._kv.hash_block_size,
            alignment=self._kv.cache_hit_alignment_tokens,
        )

    def kv_specs(self, span: Span) -> dict[str, KvSpec]:
        """What the attention layers of `span` are expected to be."""
        return {
            name: encode_spec(self._spec_at_stage(spec))
            for name, spec in self._specs().items()
            if _is_in(name, span)
        }

    def needed_bytes(self, span: Span | None) -> int:
        """What moving to `span` takes beyond what is held now; negative: it frees memory."""
        if span == self.span:
            return 0
        return self._held_bytes(span) - self._held_bytes(self.span)

    def check_room(self, span: Span | None) -> None:
        """Raises SplitError: what is free does not suffice for moving to `span`."""
        needed, free = self.needed_bytes(span), free_bytes()
        if needed > free:
            raise SplitError(
                f"the layers do not fit here: they take {needed >> 20} MiB, {free >> 20} are free"
            )

    def has_room(self, span: Span | None) -> bool:
        """Whether moving to `span` would leave a good part of what is free unused."""
        return bool(self._weights) and self.needed_bytes(span) < _USED_SHARE * free_bytes()

    def move(self, span: Span | None) -> None:
        """Hold all layers but those of `span`; None: all of them. KV blocks are empty then.

        Raises:
            SplitError: memory does not suffice; nothing has changed then.
        """
        self.check_room(span)
        layers = self._plan.layers
        assert layers is not None
        was, will = _indices(self.span), _indices(span)
        with set_current_vllm_config(self._config):
            for plan in self._loaded(was - will):
                assert plan.layers is not None
                for index in range(plan.first, plan.end):
                    layers[index] = plan.layers[index]
            self._forget(will - was)
            self._plan.vacate(will)
            self.span = span
            gc.collect()
            self._allocate_kv(span)

    def _loaded(self, indices: set[int]) -> list[OnlySpan]:
        assert self._plan.layers is not None
        plans = [OnlySpan(*run, len(self._plan.layers)) for run in _runs(indices)]
        try:
            for plan in plans:
                with loading_only(plan):
                    get_model(vllm_config=self._config)
        except Exception as error:
            self._forget(indices)
            if not is_out_of_memory(error):
                raise
            raise SplitError(f"out of memory while layers {_runs(indices)} were loaded") from None
        return plans

    def _forget(self, indices: set[int]) -> None:
        """Let vLLM register layers of these numbers again."""
        context = self._config.compilation_config.static_forward_context
        for name in [each for each in context if extract_layer_index(each) in indices]:
            del context[name]

    def _allocate_kv(self, span: Span | None) -> None:
        groups = self._projected(span, inside=False)
        pool_bytes = self._kv.num_blocks * _pool_bytes_per_block(self._config, groups)
        here = get_kv_cache_config_from_groups(self._config, groups, pool_bytes)
        here.kv_cache_layout = self._kv.kv_cache_layout
        here.hash_block_size = self._kv.hash_block_size
        here.cache_hit_alignment_tokens = self._kv.cache_hit_alignment_tokens
        runner = self._worker.model_runner
        if has_kv_transfer_group():
            get_kv_transfer_group().let_go()
        clear_layer_kv_caches(self._config.compilation_config.static_forward_context.values())
        runner.kv_caches.clear()
        runner.attn_groups.clear()
        self._worker.initialize_from_config(here)

    def _projected(self, span: Span | None, inside: bool) -> list[KVCacheGroupSpec]:
        """The groups with the layers inside of `span` alone, or with those outside."""
        chosen = {
            name: spec
            for name, spec in self._specs().items()
            if (span is not None and _is_in(name, span)) == inside
        }
        return _project_kv_cache_groups_to_worker(self._groups, chosen)

    def _at_stage(self, group: KVCacheGroupSpec) -> KVCacheGroupSpec:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            specs = {name: self._spec_at_stage(each) for name, each in spec.kv_cache_specs.items()}
            spec = UniformTypeKVCacheSpecs(block_size=spec.block_size, kv_cache_specs=specs)
        else:
            spec = self._spec_at_stage(spec)
        return KVCacheGroupSpec(list(group.layer_names), spec)

    def _spec_at_stage(self, spec: KVCacheSpec) -> KVCacheSpec:
        return in_dtype(spec, self._stage_dtype, self._config.model_config.dtype)

    def _specs(self) -> dict[str, KVCacheSpec]:
        return layer_specs(self._groups)

    def _held_bytes(self, span: Span | None) -> int:
        """Weights and KV blocks of all layers but those of `span`."""
        away = _indices(span)
        weights = sum(each for i, each in enumerate(self._weights) if i not in away)
        groups = self._projected(span, inside=False)
        return weights + self._kv.num_blocks * _pool_bytes_per_block(self._config, groups)


def _indices(span: Span | None) -> set[int]:
    return set() if span is None else set(range(*span))


def _is_in(name: str, span: Span) -> bool:
    return span[0] <= extract_layer_index(name) < span[1]


def _runs(indices: set[int]) -> list[Span]:
    """Runs of consecutive numbers."""
    firsts = sorted(each for each in indices if each - 1 not in indices)
    ends = sorted(each + 1 for each in indices if each + 1 not in indices)
    return list(zip(firsts, ends, strict=True))


def _merged(here: KVCacheGroupSpec, there: KVCacheGroupSpec) -> KVCacheGroupSpec:
    """One group of the whole model from its two parts."""
    spec, other = here.kv_cache_spec, there.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs) and isinstance(other, UniformTypeKVCacheSpecs):
        specs = {**spec.kv_cache_specs, **other.kv_cache_specs}
        spec = UniformTypeKVCacheSpecs(block_size=spec.block_size, kv_cache_specs=specs)
    elif not here.layer_names:
        spec = other
    return KVCacheGroupSpec([*here.layer_names, *there.layer_names], spec)
