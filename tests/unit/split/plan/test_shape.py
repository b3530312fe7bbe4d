"""Counts of small models by hand, and against the modules themselves."""

import json
import struct
from pathlib import Path

import pytest

pytest.importorskip("transformers")
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from mcp_vllm.split.plan.read import ModelUnreadable, read_model, safetensors_sizes, shape_of
from mcp_vllm.split.plan.shape import LayerShape, Work

COMMON = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
LLAMA = LlamaConfig(num_hidden_layers=3, num_key_value_heads=2, head_dim=16, **COMMON)
QWEN3 = Qwen3Config(num_hidden_layers=4, num_key_value_heads=1, head_dim=32, **COMMON)
GEMMA3 = Gemma3TextConfig(
    num_hidden_layers=7,
    num_key_value_heads=1,
    head_dim=16,
    sliding_window=32,
    **COMMON | {"tie_word_embeddings": True},
)
DEEPSEEK = DeepseekV2Config(
    num_hidden_layers=3,
    num_key_value_heads=4,
    kv_lora_rank=16,
    q_lora_rank=None,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    moe_intermediate_size=32,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    **COMMON,
)
QWEN3_MOE = Qwen3MoeConfig(
    num_hidden_layers=2,
    num_key_value_heads=2,
    head_dim=16,
    moe_intermediate_size=32,
    num_experts=4,
    num_experts_per_tok=2,
    **COMMON,
)
CONFIGS = {
    "llama": LLAMA,
    "qwen3": QWEN3,
    "gemma3": GEMMA3,
    "deepseek": DEEPSEEK,
    "qwen3-moe": QWEN3_MOE,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_real_modules(name: str) -> None:
    config = CONFIGS[name]
    shape = shape_of(config, name, "bfloat16")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    assert shape.parameters == sum(each.numel() for each in model.parameters())
    for layer, module in zip(shape.layers, model.model.layers, strict=True):
        assert layer.parameters == sum(each.numel() for each in module.parameters())
        assert layer.weight_bytes == 2 * layer.parameters


def test_a_llama_layer_by_hand() -> None:
    shape = shape_of(LLAMA, "llama", "bfloat16")
    projections = 64 * 64 + 2 * 64 * 32 + 64 * 64
    mlp = 3 * 64 * 96
    for layer in shape.layers:
        assert layer.parameters == projections + mlp + 2 * 64
        assert layer.linear_flops == 2 * (projections + mlp)
        assert layer.attention_flops == layer.prefill_attention_flops == 4 * 4 * 16
        assert layer.kv_bytes == 2 * 2 * 16 * 2
        assert layer.window is None
    assert shape.outer_parameters == 2 * 100 * 64 + 64
    assert shape.outer_bytes == 2 * shape.outer_parameters
    assert shape.head_flops == 2 * 100 * 64
    token_bytes = {form: cost.token_bytes for form, cost in shape.forms.items()}
    assert token_bytes == {"raw": 256, "packed": 192, "fold": 128, "fp8": 68}
    assert [form for form, cost in shape.forms.items() if cost.token_s or cost.way_s] == ["packed"]


def test_float32_doubles_bytes_and_not_flops() -> None:
    half, full = (shape_of(LLAMA, "llama", each) for each in ("bfloat16", "float32"))
    assert full.layers[0].weight_bytes == 2 * half.layers[0].weight_bytes
    assert full.layers[0].kv_bytes == 2 * half.layers[0].kv_bytes
    assert full.layers[0].linear_flops == half.layers[0].linear_flops


def test_qwen3_has_normed_heads_wider_than_its_hidden_size() -> None:
    layer = shape_of(QWEN3, "qwen3", "bfloat16").layers[0]
    linear = 64 * 128 + 2 * 64 * 32 + 128 * 64 + 3 * 64 * 96
    assert layer.linear_flops == 2 * linear
    assert layer.parameters == linear + 2 * 32 + 2 * 64
    assert layer.attention_flops == 4 * 4 * 32
    assert layer.kv_bytes == 2 * 32 * 2


def test_gemma3_slides_but_in_every_sixth_layer_and_has_one_table_for_both_ends() -> None:
    shape = shape_of(GEMMA3, "gemma3", "bfloat16")
    assert [each.window for each in shape.layers] == [32, 32, 32, 32, 32, None, 32]
    assert shape.outer_parameters == 100 * 64 + 64
    assert shape.layers[0].parameters == 2 * 64 * 64 + 2 * 64 * 16 + 2 * 16 + 3 * 64 * 96 + 4 * 64


def test_deepseek_keeps_latents_and_uses_two_of_eight_experts() -> None:
    dense, sparse, _ = shape_of(DEEPSEEK, "deepseek", "bfloat16").layers
    attention = 64 * 4 * 12 + 64 * (16 + 4) + 16 * 4 * (8 + 8) + 4 * 8 * 64
    expert = 3 * 64 * 32
    assert dense.linear_flops == 2 * (attention + 3 * 64 * 96)
    assert sparse.linear_flops == 2 * (attention + 64 * 8 + (1 + 2) * expert)
    assert sparse.parameters == attention + 64 * 8 + (1 + 8) * expert + 16 + 2 * 64
    assert sparse.expert_bytes == 2 * 8 * expert
    assert sparse.chosen == 0.25
    assert dense.expert_bytes == 0
    assert dense.kv_bytes == (16 + 4) * 2
    assert dense.attention_flops == 2 * 4 * (2 * 16 + 4)
    assert dense.prefill_attention_flops == 2 * 4 * (8 + 4 + 8)


def test_qwen3_moe_reads_more_experts_the_more_tokens_there_are() -> None:
    layer = shape_of(QWEN3_MOE, "qwen3-moe", "bfloat16").layers[0]
    experts = 4 * 3 * 64 * 32 * 2
    assert layer.expert_bytes == experts
    rest = layer.weight_bytes - experts
    assert layer.bytes_read(Work(1, 1, 1)) == rest + experts / 2 + layer.kv_bytes
    assert layer.bytes_read(Work(2, 1, 1)) == rest + experts * 0.75 + 2 * layer.kv_bytes


def test_a_window_without_layer_types_is_every_layers() -> None:
    config = MistralConfig(num_hidden_layers=2, num_key_value_heads=2, sliding_window=48, **COMMON)
    assert [each.window for each in shape_of(config, "mistral").layers] == [48, 48]


def plain_layer(window: int | None = None) -> LayerShape:
    return LayerShape(10, 20, 100.0, 1.0, 1.0, 4, window)


@pytest.mark.parametrize("window", [None, 1, 5, 8, 100])
@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (1, 9), (4, 9), (9, 9), (7, 20)])
def test_attention_counts_each_pair_of_tokens_once(window, tokens, context) -> None:
    pairs = sum(
        min(position, window or position) for position in range(context - tokens + 1, context + 1)
    )
    work = Work(3, tokens, context)
    assert plain_layer(window).flops(work) == pytest.approx(3 * (tokens * 100 + pairs))


def test_sizes_of_a_file_are_taken_before_those_of_the_modules(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    header = {
        "__metadata__": {"format": "pt"},
        "model.embed_tokens.weight": _tensor(0, 100),
        "model.layers.0.mlp.weight": _tensor(100, 130),
        "model.layers.2.a.weight": _tensor(130, 170),
        "model.layers.2.b.weight": _tensor(170, 180),
        "model.layers.3.extra": _tensor(180, 999),
    }
    _write(tmp_path / "model.safetensors", json.dumps(header).encode())
    shape = read_model(str(tmp_path))
    assert shape.layers[0].weight_bytes == 30
    assert shape.layers[2].weight_bytes == 50
    assert shape.outer_bytes == 100


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 5) + b"{nope",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": {}}',
    ],
)
def test_a_broken_weight_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelUnreadable, match=r"broken\.safetensors"):
        safetensors_sizes(path)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match=str(tmp_path)):
        read_model(str(tmp_path))


@pytest.mark.parametrize(("requests", "tokens", "context"), [(0, 1, 1), (1, 0, 1), (1, 3, 2)])
def test_a_step_that_cannot_be_is_refused(requests: int, tokens: int, context: int) -> None:
    with pytest.raises(ValueError, match="a step of"):
        Work(requests, tokens, context)


def _tensor(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


def _write(path: Path, header: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header)
