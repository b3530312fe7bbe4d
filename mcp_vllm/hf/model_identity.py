"""What must agree before one model may read another's cache.

Configuration is compared field by field, so that a refusal can name the field. Of the weights a
sample of each parameter is hashed: enough to tell a fine-tuned model from its base without reading
gigabytes. A side that knows only the configuration cannot compare weights, and does not.
"""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3

from mcp_vllm.hf import library
from mcp_vllm.hf.errors import OtherModelError
from mcp_vllm.session.fingerprint import MAX_VALUE_CHARS, Fingerprint

# In the order in which a person would look for the difference.
_CONFIG_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "v_head_dim",
    "num_kv_shared_layers",
    "layer_types",
    "sliding_window",
    "attention_chunk_size",
    "rope_parameters",
)
_SAMPLED_VALUES = 64


def text_config(model_or_config: Any) -> Any:
    """The configuration of the decoder, of a model or of a configuration."""
    config = getattr(model_or_config, "config", model_or_config)
    return config.get_text_config(decoder=True)


def identify(model_or_config: Any) -> Fingerprint:
    """The fingerprint of a transformers model, or of as much as its configuration tells."""
    config = text_config(model_or_config)
    fields = {
        name: _as_text(value)
        for name in _CONFIG_FIELDS
        if (value := getattr(config, name, None)) is not None
    }
    dtype = getattr(model_or_config, "dtype", None)
    if dtype is not None:
        fields["dtype"] = str(dtype).removeprefix("torch.")
    if hasattr(model_or_config, "named_parameters"):
        fields["weights"] = _weights_sample(model_or_config)
    return Fingerprint(fields)


def check_same_model(theirs: Fingerprint, model_or_config: Any) -> None:
    """OtherModelError unless an export with this fingerprint belongs to the model."""
    ours = identify(model_or_config)
    unknown_here = {"dtype", "weights"} - ours.fields.keys()
    known = {name: value for name, value in theirs.fields.items() if name not in unknown_here}
    difference = ours.first_difference(Fingerprint(known))
    if difference is not None:
        raise OtherModelError(
            f"the cache belongs to another model: {difference}; load the model it was made with"
        )


def _as_text(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= MAX_VALUE_CHARS else blake3(text.encode()).hexdigest()


def _weights_sample(model: Any) -> str:
    torch = library.torch()
    digest = blake3()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.device.type == "meta":  # The values are elsewhere, and not known here.
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)][:_SAMPLED_VALUES]
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest(length=16)
