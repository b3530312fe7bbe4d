"""A model's shape from its own files: config.json, the meta-device modules of transformers, and the
headers of its safetensors. No weight is read, nothing is fetched but a config by name.
"""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any, cast, get_args

from mcp_vllm.split.errors import SplitError
from mcp_vllm.split.plan.shape import Dtype, LayerShape, ModelShape

_MAX_HEADER_BYTES = 64 << 20
_TOP_K = ("num_experts_per_tok", "moe_topk", "top_k_experts")
_NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")


class ModelUnreadable(SplitError):
    """No shape can be made of this model; names what is missing or unusual."""


def read_model(model: str, dtype: str | None = None) -> ModelShape:
    """The shape of a folder's model, or of one of the Hub by name.

    Args:
        dtype: of activations and KV; None: the config's.

    Raises:
        ModelUnreadable: not a causal language model, or one with an unusual structure.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelUnreadable(f"{model}: no model config: {_first_line(error)}") from error
    stored = _stored_bytes(Path(model))
    return shape_of(config, Path(model).name, dtype, stored)


def stored_layer_bytes(folder: Path, num_layers: int) -> list[int]:
    """What each layer's weights take in a folder's safetensors; empty: they do not say.

    Raises ModelUnreadable: a file is broken.
    """
    layers, _ = _by_layer(_stored_bytes(folder), num_layers)
    return [layers[each] for each in range(num_layers)] if len(layers) == num_layers else []


def shape_of(
    config: Any, name: str, dtype: str | None = None, stored: dict[str, int] | None = None
) -> ModelShape:
    """The shape of a transformers config; `stored` are the bytes of tensors by name, if known.

    Raises ModelUnreadable.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from mcp_vllm.split.activations import FORMS, Form

    text = config.get_text_config()
    known = _known_dtype(name, dtype or str(getattr(text, "dtype", None) or "bfloat16"))
    kind: torch.dtype = getattr(torch, known)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)
    except (ValueError, KeyError) as error:
        raise ModelUnreadable(f"{name}: {_first_line(error)}") from error
    prefix, stack = _decoder_layers(model, text.num_hidden_layers, name)
    stored_by_layer, stored_outer = _by_layer(stored or {}, len(stack))
    layers = tuple(
        _layer(module, text, i, kind.itemsize, stored_by_layer.get(i))
        for i, module in enumerate(stack)
    )
    outer = {
        id(each): each.numel()
        for key, each in model.named_parameters()
        if not key.startswith(f"{prefix}.")
    }
    head = model.get_output_embeddings()
    if text.tie_word_embeddings and head is not None:
        outer[id(head.weight)] = 0  # on the meta device it may still be a parameter of its own
        outer[id(model.get_input_embeddings().weight)] = head.weight.numel()
    forms = [Form(form, text.hidden_size, kind, True) for form in FORMS]
    return ModelShape(
        name=name,
        dtype=known,
        hidden=text.hidden_size,
        layers=layers,
        outer_bytes=stored_outer or sum(outer.values()) * kind.itemsize,
        outer_parameters=sum(outer.values()),
        head_flops=2.0 * text.vocab_size * text.hidden_size,
        forms={form.name: form.usual_cost for form in forms},
    )


def _known_dtype(name: str, dtype: str) -> Dtype:
    for known in get_args(Dtype):
        if dtype.removeprefix("torch.") == known:
            return cast(Dtype, known)
    raise ModelUnreadable(f"{name}: dtype {dtype!r} is none of {', '.join(get_args(Dtype))}")


def _decoder_layers(model: Any, num_layers: int, name: str) -> tuple[str, Any]:
    import torch

    for key, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return key, module
    raise ModelUnreadable(f"{name}: no stack of {num_layers} decoder layers")


def _layer(
    module: Any, config: Any, index: int, itemsize: int, stored_bytes: int | None
) -> LayerShape:
    experts = everything = weighted = 0
    for key, each in module.named_parameters():
        everything += each.numel()
        if "experts" in key.split("."):
            experts += each.numel()
        elif each.dim() > 1:
            weighted += each.numel()
    chosen = min(1.0, _first(config, _TOP_K, 1) / _first(config, _NUM_EXPERTS, 1)) if experts else 1
    weight_bytes = stored_bytes or everything * itemsize
    attention = next(
        (each for key, each in module.named_modules() if key.endswith(("attn", "attention"))), None
    )
    decode, prefill, kv_values = _attention(config, attention)
    return LayerShape(
        parameters=everything,
        weight_bytes=weight_bytes,
        linear_flops=2.0 * (weighted + experts * chosen),
        attention_flops=decode,
        prefill_attention_flops=prefill,
        kv_bytes=kv_values * itemsize,
        window=_window(config, attention, index),
        expert_bytes=round(weight_bytes * experts / everything),
        chosen=float(chosen),
    )


def _attention(config: Any, attention: Any) -> tuple[float, float, int]:
    """FLOPs a token and a token of context in decode and in prefill; numbers kept a token."""
    heads = config.num_attention_heads
    rank = getattr(config, "kv_lora_rank", None)
    if rank:
        rope, nope, value = (
            config.qk_rope_head_dim,
            config.qk_nope_head_dim,
            config.v_head_dim,
        )
        # Decode works on the latent itself: scores over rank + rope, values of rank numbers.
        return 2.0 * heads * (2 * rank + rope), 2.0 * heads * (nope + rope + value), rank + rope
    head_dim = getattr(attention, "head_dim", None) or config.hidden_size // heads
    keys = getattr(attention, "k_proj", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    kv_width = keys.out_features if keys is not None else kv_heads * head_dim
    return 4.0 * heads * head_dim, 4.0 * heads * head_dim, 2 * kv_width


def _window(config: Any, attention: Any, index: int) -> int | None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        kind = kinds[index]
        if kind == "chunked_attention":
            window = getattr(config, "attention_chunk_size", None)
        return window if kind in ("sliding_attention", "chunked_attention") else None
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(attention, "sliding_window", window)


def _first(config: Any, names: tuple[str, ...], default: int) -> int:
    return next((value for name in names if (value := getattr(config, name, None))), default)


def _by_layer(stored: dict[str, int], num_layers: int) -> tuple[dict[int, int], int]:
    """Bytes of each layer's tensors, and of all the others."""
    layers: defaultdict[int, int] = defaultdict(int)
    outer = 0
    for name, size in stored.items():
        _, found, rest = name.partition("layers.")
        number = rest.partition(".")[0]
        if not (found and number.isascii() and number.isdigit()):
            outer += size
        elif int(number) < num_layers:  # beyond: layers for speculative decoding
            layers[int(number)] += size
    return dict(layers), outer


def _stored_bytes(folder: Path) -> dict[str, int]:
    """Bytes by tensor of a folder's safetensors; empty when there are none."""
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        sizes.update(safetensors_sizes(path))
    return sizes


def safetensors_sizes(path: Path) -> dict[str, int]:
    """Bytes by tensor, from the file's header. Raises ModelUnreadable."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        sizes = {}
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                if not (0 <= begin <= end and math.prod(tensor["shape"]) >= 0):
                    raise ValueError(f"tensor {name[:80]!r}")
                sizes[name] = end - begin
        return sizes
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnreadable(f"{path}: no safetensors header: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
