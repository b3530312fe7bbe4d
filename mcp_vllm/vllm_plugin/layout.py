"""Where each KV cache group's bytes lie in a host chunk, worked out on the scheduler's side.

The worker lays the pages of all KV cache tensors one after the other into a chunk; a group uses the
tensors that hold its layers. What a group does not use is left over from another chunk and must not
be stored or sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
)
from vllm.v1.kv_offload.base import OffloadingSpec

from mcp_vllm.link.protocol import Arrangement, GroupLayout, PageLayout
from mcp_vllm.vllm_plugin.remote_layers import announced

# By the instruction set that vLLM's CPU attention picks; read back from its cache-writing operator
# in tests/integration/test_cpu_pages.py.
_ARRANGEMENTS: dict[str, Arrangement] = {
    "amx": "matrix-tiles",
    "vec": "channel-major-keys",
    "vec16": "channel-major-keys",
}
_ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}

Address = tuple[int, int]
Span = tuple[int, int]


def group_layouts(spec: OffloadingSpec, kv_cache_config: KVCacheConfig) -> list[GroupLayout]:
    """One layout a KV cache group, indexed by vLLM's group index.

    Groups that are not offloaded get the layout of a whole chunk; no key names them.
    """
    whole = [(0, spec.kv_bytes_per_chunk)]
    remote = announced()
    offloaded = {group.group_id: group.layer_names for group in spec.config.groups}
    pages = _tensor_pages(kv_cache_config, list(offloaded.values()))
    layouts = []
    for group_id, group in enumerate(kv_cache_config.kv_cache_groups):
        element, channels = _element(group.kv_cache_spec)
        layers = offloaded.get(group_id)
        spans = _spans(spec, pages, _addresses(kv_cache_config), layers) if pages and layers else []
        described = None
        if spans:
            in_order = _in_order(pages, kv_cache_config, layers)
            if remote is not None:
                away = remote.groups[group_id]
                own_bytes = sum(pages.values()) * spec.blocks_per_chunk
                size = len(away) * remote.page_bytes * spec.blocks_per_chunk
                spans = _merged([*spans, (own_bytes, size)])
                in_order = [*in_order, *away]
            described = _pages(spec, group.kv_cache_spec, in_order)
        layouts.append(GroupLayout(tuple(spans or whole), element, channels, described))
    return layouts


def _in_order(
    pages: dict[Address, int], kv_cache_config: KVCacheConfig, layers: Sequence[str]
) -> list[str]:
    """The layers by the place of their pages in a chunk."""
    places = {address: place for place, address in enumerate(pages)}
    addresses = _addresses(kv_cache_config)
    return sorted(layers, key=lambda layer: places[addresses[layer]])


def _pages(
    spec: OffloadingSpec, kv_cache_spec: KVCacheSpec, layers: Sequence[str]
) -> PageLayout | None:
    """What the pages hold, where it was verified: the CPU backend's on x86, one worker. None
    elsewhere: lossy tiers are then not used."""
    is_plain = isinstance(kv_cache_spec, AttentionSpec) and kv_cache_spec.dtype in _ELEMENTS
    one_worker = spec.replicated_layout or spec.config.parallel.world_size == 1
    if not (is_plain and one_worker and current_platform.is_cpu()):
        return None
    is_latent = isinstance(kv_cache_spec, MLAAttentionSpec)
    arrangement: Arrangement | None = "latent" if is_latent else cpu_arrangement(kv_cache_spec)
    if arrangement is None:
        return None
    pages = PageLayout(
        arrangement=arrangement,
        layers=tuple(extract_layer_index(layer) for layer in layers),
        num_blocks=spec.blocks_per_chunk,
        block_tokens=kv_cache_spec.block_size,
        num_heads=1 if is_latent else kv_cache_spec.num_kv_heads,
        head_dim=kv_cache_spec.head_size,
    )
    elements = pages.block_tokens * pages.num_heads * pages.head_dim * (1 if is_latent else 2)
    fits = elements * kv_cache_spec.dtype.itemsize == kv_cache_spec.page_size_bytes
    return pages if fits else None


def cpu_arrangement(kv_cache_spec: AttentionSpec) -> Arrangement | None:
    """How the CPU backend keeps K and V of such a layer: it packs them for its instruction set."""
    isa = _get_attn_isa(kv_cache_spec.dtype, kv_cache_spec.block_size, kv_cache_spec.head_size)
    return _ARRANGEMENTS.get(isa)


def _addresses(kv_cache_config: KVCacheConfig) -> dict[str, Address]:
    """Layer name -> (offset of its block 0, bytes between blocks); equal ones share their bytes."""
    return {
        layer: (tensor.offset + index * tensor.layer_stride, tensor.block_stride)
        for tensor in kv_cache_config.kv_cache_tensors
        for index, layer in enumerate(tensor.layers)
    }


def _tensor_pages(
    kv_cache_config: KVCacheConfig, groups: Sequence[Sequence[str]]
) -> dict[Address, int]:
    """Distinct tensors in the worker's order -> page size in bytes; empty for packed layouts."""
    addresses = _addresses(kv_cache_config)
    specs = layer_specs(kv_cache_config.kv_cache_groups)
    pages: dict[Address, int] = {}
    for layer in (layer for layers in groups for layer in layers):
        address, page = addresses[layer], specs[layer].page_size_bytes
        if address[1] != page:
            return {}
        pages.setdefault(address, page)
    return pages


def layer_specs(groups: Sequence[KVCacheGroupSpec]) -> dict[str, KVCacheSpec]:
    """Of each layer by name, also where a group's layers have specs of their own."""
    specs = {}
    for group in groups:
        per_layer = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        for layer in group.layer_names:
            specs[layer] = per_layer.get(layer, group.kv_cache_spec)
    return specs


def _spans(
    spec: OffloadingSpec,
    pages: dict[Address, int],
    addresses: dict[str, Address],
    layers: Sequence[str],
) -> list[Span]:
    """The group's parts of a chunk, all workers' included, neighbours merged."""
    used = {addresses[layer] for layer in layers}
    parts: list[Span] = []
    offset = 0
    for address, page in pages.items():
        size = page * spec.blocks_per_chunk
        if address in used:
            parts.append((offset, size))
        offset += size
    num_copies = 1 if spec.replicated_layout else spec.config.parallel.world_size
    return _merged(
        (copy * spec.cpu_page_size_per_worker + start, size)
        for copy in range(num_copies)
        for start, size in parts
    )


def _merged(parts: Iterable[Span]) -> list[Span]:
    """The same, neighbours as one; without empty ones."""
    spans: list[Span] = []
    for start, size in parts:
        if spans and sum(spans[-1]) == start:
            spans[-1] = (spans[-1][0], spans[-1][1] + size)
        elif size:
            spans.append((start, size))
    return spans


def _element(kv_cache_spec: KVCacheSpec) -> tuple[str, int]:
    """Element type and innermost axis of the group's pages, for the codec."""
    per_layer = getattr(kv_cache_spec, "kv_cache_specs", None)
    spec = next(iter(per_layer.values())) if per_layer else kv_cache_spec
    if not isinstance(spec, AttentionSpec):
        return "u8", 1
    size = spec.dtype.itemsize
    element = _ELEMENTS.get(spec.dtype, "f8" if size == 1 else "u8")
    # On CPU a page keeps K and V apart; elsewhere a token's K and V lie together.
    channels = (
        spec.head_size if current_platform.is_cpu() else spec.state_content_size_bytes // size
    )
    return element, max(1, channels)
