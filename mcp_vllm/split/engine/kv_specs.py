"""KV cache specs of vLLM as plain values, through a list of what may cross.

The stage tells what its attention layers need; vLLM's planner, in the engine, groups them with its
own; the stage gets its part of the groups back. Classes and field names are checked against
vLLM's; nothing is ever evaluated or unpickled.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
    SparseCacheRole,
    UniformTypeKVCacheSpecs,
)

from mcp_vllm.split.errors import StageRefused, WireError
from mcp_vllm.split.wire import KvGroup, KvSpec

_CLASSES = {
    each.__name__: each
    for each in (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec, MLAAttentionSpec)
}
_DTYPES = {
    str(each).removeprefix("torch."): each
    for each in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.uint8,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
}


def encode_spec(spec: KVCacheSpec) -> KvSpec:
    """Raises StageRefused: a kind of KV cache that cannot be split (yet)."""
    name = type(spec).__name__
    if name not in _CLASSES:
        raise StageRefused("", "model", f"layers with a {name} cannot be split")
    fields = {
        each.name: _encode_value(name, each.name, getattr(spec, each.name))
        for each in dataclasses.fields(spec)
        if each.init
    }
    return name, fields


def decode_spec(encoded: KvSpec) -> KVCacheSpec:
    """Raises WireError."""
    name, values = encoded
    kind = _CLASSES.get(name)
    if kind is None:
        raise WireError(f"unknown KV cache spec {name[:40]!r}")
    known = {each.name for each in dataclasses.fields(kind) if each.init}
    if not set(values) <= known:
        raise WireError(f"{name} has no field {sorted(set(values) - known)[0][:40]!r}")
    try:
        return kind(**{field: _decode_value(field, value) for field, value in values.items()})
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise WireError(f"{name}: {str(error)[:200]}") from None


def in_dtype(spec: KVCacheSpec, dtype: torch.dtype, instead_of: torch.dtype) -> KVCacheSpec:
    """The spec of the same layer where the model computes in `dtype`: blocks of the same size.
    Blocks of a type of their own, as fp8, keep it."""
    if getattr(spec, "dtype", None) != instead_of:
        return spec
    return dataclasses.replace(spec, dtype=dtype)  # type: ignore[call-arg]


def encode_group(group: KVCacheGroupSpec) -> KvGroup:
    """Raises StageRefused."""
    spec = group.kv_cache_spec
    if not isinstance(spec, UniformTypeKVCacheSpecs):
        return KvGroup(list(group.layer_names), encode_spec(spec))
    layer_specs = {name: encode_spec(each) for name, each in spec.kv_cache_specs.items()}
    first = next(iter(layer_specs.values()))
    return KvGroup(list(group.layer_names), first, layer_specs)


def decode_group(group: KvGroup) -> KVCacheGroupSpec:
    """Raises WireError."""
    spec = decode_spec(group.spec)
    if group.layer_specs is not None:
        specs = {name: decode_spec(each) for name, each in group.layer_specs.items()}
        spec = UniformTypeKVCacheSpecs(block_size=spec.block_size, kv_cache_specs=specs)
    return KVCacheGroupSpec(list(group.layers), spec)


def _encode_value(kind: str, field: str, value: Any) -> int | bool | str | None:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, KVQuantMode | SparseCacheRole):
        return value.value
    if value is None or type(value) in (int, bool, str):
        return value
    raise StageRefused("", "model", f"layers whose {kind} has {field} {value!r} cannot be split")


def _decode_value(field: str, value: int | bool | str | None) -> Any:
    if field == "dtype":
        return _DTYPES[str(value)]
    if field == "kv_quant_mode":
        return KVQuantMode(value)
    if field == "cache_role":
        return SparseCacheRole(value)
    return value
