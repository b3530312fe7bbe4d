"""The span's layers in the engine itself, when no stage is left.

The layers are loaded as a stage loads them and put in the places that the engine's model keeps for
them; then the worker's KV blocks are allocated anew, as many as before, for all layers. Request
states, sampling states included, stay.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader import get_model
from vllm.v1.core.kv_cache_utils import _pool_bytes_per_block, get_kv_cache_config_from_groups
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, UniformTypeKVCacheSpecs
from vllm.v1.worker.utils import clear_layer_kv_caches

from mcp_vllm.split.engine.layers import AllButSpan, OnlySpan
from mcp_vllm.split.engine.middle import loading_only

logger = logging.getLogger(__name__)


class LocalLayers:
    """Brings the layers that `plan` has left out into this process."""

    def __init__(self, config: VllmConfig, plan: AllButSpan) -> None:
        self._config = config
        self._plan = plan

    def load(self, worker: Any, kv_cache_configs: list[KVCacheConfig]) -> None:
        """Load and put in place; `kv_cache_configs` are the worker's and the stage's.

        Raises whatever vLLM raises, as when memory does not suffice.
        """
        layers = self._plan.layers
        assert layers is not None
        plan = OnlySpan(self._plan.first, self._plan.end, len(layers))
        with set_current_vllm_config(self._config):
            with loading_only(plan):
                get_model(vllm_config=self._config)
            assert plan.layers is not None
            for index in range(plan.first, plan.end):
                layers[index] = plan.layers[index]
            self._allocate_kv(worker.worker, kv_cache_configs)

    def _allocate_kv(self, worker: Any, kv_cache_configs: list[KVCacheConfig]) -> None:
        local, remote = kv_cache_configs
        groups = [
            _merged(*pair)
            for pair in zip(local.kv_cache_groups, remote.kv_cache_groups, strict=True)
        ]
        pool_bytes = local.num_blocks * _pool_bytes_per_block(self._config, groups)
        whole = get_kv_cache_config_from_groups(self._config, groups, pool_bytes)
        whole.kv_cache_layout = local.kv_cache_layout
        whole.hash_block_size = local.hash_block_size
        whole.cache_hit_alignment_tokens = local.cache_hit_alignment_tokens
        runner = worker.model_runner
        clear_layer_kv_caches(self._config.compilation_config.static_forward_context.values())
        runner.kv_caches.clear()
        runner.attn_groups.clear()
        worker.initialize_from_config(whole)


def _merged(here: KVCacheGroupSpec, there: KVCacheGroupSpec) -> KVCacheGroupSpec:
    """One group of the whole model from its two parts."""
    spec, other = here.kv_cache_spec, there.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs) and isinstance(other, UniformTypeKVCacheSpecs):
        specs = {**spec.kv_cache_specs, **other.kv_cache_specs}
        spec = UniformTypeKVCacheSpecs(block_size=spec.block_size, kv_cache_specs=specs)
    elif not here.layer_names:
        spec = other
    return KVCacheGroupSpec([*here.layer_names, *there.layer_names], spec)
