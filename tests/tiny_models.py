"""Small random models, written to a folder in Hugging Face form, for tests with real engines.

Each has the attention of a family that vLLM serves (grouped queries, Qwen3's normed queries and
keys, DeepSeek-V2's latent cache) and a byte-level tokenizer, so prompts need no downloaded file.
Contents depend on the seed only: two folders written with one seed hold equal weights, another seed
is another model of the same shape.

Greedy choices of a purely random model are a chain of near-ties. Here the output head holds, beside
random rows, a copy of the embeddings shifted along a random ring of all tokens: the present token
proposes its successor strongly and the context overrules it now and then, so that a wrong KV cache
still shows. Measured over 510 greedy steps, in float32: median gap of the top two logits 1.37
(llama), 1.27 (qwen3), 1.62 (deepseek_v2) against 0.18-0.25 without the copy. bfloat16 flips 1 to 3
of those choices (9 to 16 without the copy); a wrong prompt changes 62 to 88.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM as AutoModel
from transformers import DeepseekV2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>")
PAD_ID, EOS_ID, BOS_ID = range(3)
VOCAB_SIZE = 320  # 3 special tokens and 256 bytes, rounded up
MAX_POSITION = 8192
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITION,
    "tie_word_embeddings": False,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}

# Weight of the embeddings' copy in the output head: at 0.3 near-ties abound, at 0.8 the context
# hardly matters.
_HEAD_ECHO = 0.5


def llama_config() -> PreTrainedConfig:
    return LlamaConfig(num_hidden_layers=4, num_key_value_heads=2, head_dim=64, **_SHARED)


def qwen3_config() -> PreTrainedConfig:
    return Qwen3Config(num_hidden_layers=4, num_key_value_heads=1, head_dim=64, **_SHARED)


def deepseek_v2_config() -> PreTrainedConfig:
    """Dense layers only; vLLM's CPU kernel takes a latent of 512 + 64 and no other size."""
    return DeepseekV2Config(
        num_hidden_layers=3,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        moe_intermediate_size=64,
        first_k_dense_replace=3,
        **_SHARED,
    )


TINY_MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": llama_config,
    "qwen3": qwen3_config,
    "deepseek_v2": deepseek_v2_config,
}


def write_tiny_model(family: str, folder: Path, seed: int = 0) -> Path:
    """Write the model of `family` (a key of TINY_MODELS) to `folder` in bfloat16; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModel.from_config(TINY_MODELS[family](), dtype=torch.bfloat16)
    _randomise(model, torch.Generator().manual_seed(seed))
    model.generation_config.eos_token_id = EOS_ID
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def write_wide_model(folder: Path, num_layers: int) -> tuple[Path, int]:
    """A Llama of so many layers, each large enough to be seen in a process's memory; returns the
    folder, and the bytes of a layer's weights."""
    shape = {**_SHARED, "hidden_size": 1024, "intermediate_size": 8192}
    config = LlamaConfig(num_hidden_layers=num_layers, num_key_value_heads=2, head_dim=64, **shape)
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModel.from_config(config, dtype=torch.bfloat16)
    # Files that are mapped one after the other: a limit on memory counts one of them at a time.
    model.save_pretrained(folder, max_shard_size="100MB")
    _write_tokenizer(folder)
    layer = model.model.layers[0]
    return folder, sum(each.numel() * each.element_size() for each in layer.parameters())


@torch.no_grad()
def _randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    for name, parameter in sorted(model.named_parameters()):
        values = torch.ones(parameter.shape)
        if parameter.dim() > 1:
            std = 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
            values = torch.randn(parameter.shape, generator=generator) * std
        parameter.copy_(values)
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    width_scale = head.shape[-1] ** -0.5
    ring = torch.randperm(VOCAB_SIZE, generator=generator)  # one long cycle through all tokens
    head[ring] += embeddings[ring.roll(1)] * (_HEAD_ECHO * width_scale)
    head[: len(SPECIAL_TOKENS)] = 0  # greedy text does not end or change role by itself


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: token_id for token_id, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS_ID)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITION,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
