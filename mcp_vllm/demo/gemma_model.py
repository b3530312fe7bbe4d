"""Gemma 3 (text) from GGUF to a Hugging Face folder: config.json and model.safetensors, bf16.

Two conventions differ. GGUF stores RMS norm weights as `1 + w`, transformers stores `w`. GGUF names
one RoPE base; the local layers' base and the pattern of sliding and full attention layers belong to
the architecture and are constants here. The output head is the embedding table (tied).
"""

import json
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mcp_vllm.demo.gguf_file import GgufFile, GgufFormatError, GgufTensor

_LOCAL_ROPE_THETA = 10_000.0
_SLIDING_WINDOW_PATTERN = 6  # five sliding layers, then a full one
_CONFIG_FORMAT = "5.0.0"  # names the RoPE parameters per layer type
_ROWS_PER_STEP = 4096
_NUM_THREADS = 2

_TOP_LEVEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def hugging_face_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """config.json of the model that GGUF `metadata` describes."""
    num_layers = metadata["gemma3.block_count"]
    head_dim = metadata["gemma3.attention.key_length"]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "transformers_version": _CONFIG_FORMAT,
        "dtype": "bfloat16",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["gemma3.embedding_length"],
        "intermediate_size": metadata["gemma3.feed_forward_length"],
        "num_hidden_layers": num_layers,
        "num_attention_heads": metadata["gemma3.attention.head_count"],
        "num_key_value_heads": metadata["gemma3.attention.head_count_kv"],
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": metadata["gemma3.context_length"],
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "sliding_window": metadata["gemma3.attention.sliding_window"],
        "sliding_window_pattern": _SLIDING_WINDOW_PATTERN,
        "layer_types": [
            "sliding_attention" if (layer + 1) % _SLIDING_WINDOW_PATTERN else "full_attention"
            for layer in range(num_layers)
        ],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": metadata["gemma3.rope.freq_base"],
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": _LOCAL_ROPE_THETA},
        },
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def write_configs(metadata: dict[str, Any], folder: Path) -> None:
    """Write config.json and generation_config.json (greedy unless a request says otherwise)."""
    config = hugging_face_config(metadata)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def hugging_face_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if gguf_name in _TOP_LEVEL_NAMES:
        return _TOP_LEVEL_NAMES[gguf_name]
    block, _, rest = gguf_name.removeprefix("blk.").partition(".")
    module = _LAYER_NAMES.get(rest.removesuffix(".weight"))
    if module is None or not block.isdigit():
        raise GgufFormatError(f"tensor {gguf_name} is not part of a Gemma 3 text model")
    return f"model.layers.{block}.{module}.weight"


def write_safetensors(gguf: GgufFile, target: Path, written: Callable[[int], None]) -> None:
    """Dequantise every tensor to bf16; `written` is called with the bytes done so far.

    Memory stays small: rows are converted a few thousand at a time and written in place.
    """
    tensors = {hugging_face_name(tensor.name): tensor for tensor in gguf.tensors.values()}
    header, starts = _safetensors_header(tensors)
    total_bytes = len(header) + sum(_bf16_bytes(tensor) for tensor in tensors.values())
    with target.open("wb") as file:
        file.write(header)
        file.truncate(total_bytes)
    out = np.memmap(target, np.uint8, "r+")
    done_bytes = len(header)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        steps = _steps(tensors, starts)
        for num_bytes in pool.map(lambda step: _convert(out, *step), steps):
            done_bytes += num_bytes
            written(done_bytes)
    out.flush()


def _bf16_bytes(tensor: GgufTensor) -> int:
    return 2 * int(np.prod(tensor.shape))


def _safetensors_header(tensors: dict[str, GgufTensor]) -> tuple[bytes, dict[str, int]]:
    """The header (length, then JSON padded to 8 bytes) and each tensor's offset in the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, offset = {}, 0
    for name in sorted(tensors):
        end = offset + _bf16_bytes(tensors[name])
        entries[name] = {
            "dtype": "BF16",
            "shape": tensors[name].shape,
            "data_offsets": [offset, end],
        }
        offsets[name], offset = offset, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def _steps(
    tensors: dict[str, GgufTensor], starts: dict[str, int]
) -> Iterator[tuple[GgufTensor, int, int, int]]:
    for name, tensor in tensors.items():
        num_rows = len(tensor.rows)
        for row in range(0, num_rows, _ROWS_PER_STEP):
            yield tensor, row, min(row + _ROWS_PER_STEP, num_rows), starts[name]


def _convert(out: np.ndarray, tensor: GgufTensor, row: int, stop: int, start: int) -> int:
    values = tensor.float32_rows(row, stop)
    if tensor.name.endswith("_norm.weight"):
        values = values - np.float32(1)
    encoded = to_bf16(values).reshape(-1).view(np.uint8)
    row_bytes = 2 * tensor.shape[-1]
    out[start + row * row_bytes : start + stop * row_bytes] = encoded
    return len(encoded)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits (uint16), rounded to nearest even; finite values only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
