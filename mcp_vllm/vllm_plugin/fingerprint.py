"""This engine's fingerprint: every fact on which its KV bytes and block hashes depend."""

from __future__ import annotations

import json
import platform
import uuid
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.base import OffloadingSpec

from mcp_vllm.cache_folder import cache_root
from mcp_vllm.errors import McpError
from mcp_vllm.link.protocol import GroupLayout
from mcp_vllm.session.fingerprint import Fingerprint
from mcp_vllm.session.weights_identity import weights_identity
from mcp_vllm.vllm_plugin.compat import release, vllm_version

FORMAT_VERSION = 1


def engine_fingerprint(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    spec: OffloadingSpec,
    layouts: list[GroupLayout],
) -> Fingerprint:
    """Reads the model's weights once (their identity is cached on disk): call it off the hot path.

    Fields a person would check first come first; see `Fingerprint.first_difference`.
    """
    parallel = spec.config.parallel
    cache = vllm_config.cache_config
    fields = {
        **model_facts(vllm_config),
        "kv_cache.element": ",".join(sorted({layout.element for layout in layouts})),
        "block_tokens": ",".join(str(group.tokens_per_block) for group in spec.config.groups),
        "chunk_blocks": str(spec.blocks_per_chunk),
        "groups": _groups(kv_cache_config),
        "layout": f"{spec.config.kv_cache_layout}/{attention_packing()}",
        "parallel": f"tp{parallel.tp_size} pp{parallel.pp_size} "
        f"pcp{parallel.pcp_size} dcp{parallel.dcp_size} world{parallel.world_size}",
        "hash.algorithm": str(cache.prefix_caching_hash_algo),
        "hash.probe": hash_probe(str(cache.prefix_caching_hash_algo)),
        "hash.tokens": str(spec.tokens_per_hash),
        "vllm": release(vllm_version() or "unknown"),
        "format": str(FORMAT_VERSION),
    }
    return Fingerprint(fields)


def model_facts(vllm_config: VllmConfig) -> dict[str, str]:
    """The model, its weights' content and the dtypes; reads the weights once, see above."""
    model = vllm_config.model_config
    return {
        "model.config": _model_config_hash(model),
        "model.weights": _weights(vllm_config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": str(model.quantization),
        "kv_cache.dtype": str(vllm_config.cache_config.cache_dtype),
    }


def _digest(value: Any) -> str:
    return blake3(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest(16)


def _model_config_hash(model: Any) -> str:
    """The model's configuration as loaded, overrides included, the folder's name excluded."""
    config = model.hf_text_config.to_dict()
    for name in ("_name_or_path", "name_or_path", "transformers_version"):
        config.pop(name, None)
    return _digest([config, model.hf_overrides if not callable(model.hf_overrides) else "callable"])


def _weights(vllm_config: VllmConfig) -> str:
    """Identity of the weights' bytes; never equal to another engine's when it cannot be known."""
    model = vllm_config.model_config
    if str(vllm_config.load_config.load_format) == "dummy":
        return f"dummy seed {model.seed}"
    try:
        return weights_identity(_model_path(model), cache_root())
    except (McpError, OSError) as error:
        return f"unknown {uuid.uuid4().hex} ({error})"


def _model_path(model: Any) -> Path:
    path = Path(model.model)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))


def _groups(kv_cache_config: KVCacheConfig) -> str:
    described = [
        [type(group.kv_cache_spec).__name__, group.kv_cache_spec.page_size_bytes, group.layer_names]
        for group in kv_cache_config.kv_cache_groups
    ]
    return f"{len(described)} groups {_digest(described)}"


def attention_packing() -> str:
    """How this machine keeps KV pages: on CPU the attention kernel packs them for its instruction
    set."""
    if not current_platform.is_cpu():
        return current_platform.device_name
    if torch.cpu._is_amx_tile_supported():
        return f"{platform.machine()} amx"
    return f"{platform.machine()} {'avx512' if torch.cpu._is_avx512_supported() else 'vec'}"


def hash_probe(algorithm: str) -> str:
    """The hash of a fixed first block by this process: differs when two processes hash differently.

    Block hashes start from a seed that vLLM draws at random for hashes that are not collision
    resistant, unless PYTHONHASHSEED is set; such an engine then shares with nobody.
    """
    hash_function = get_hash_fn_by_name(algorithm)
    none_hash = hash_function(kv_cache_utils.resolve_none_hash_seed(hash_function))
    return bytes(hash_function((none_hash, tuple(range(16)), None))).hex()[:32]
