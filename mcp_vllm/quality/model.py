"""A Hugging Face model, its tokens, and its K and V as the caches that it computes with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from mcp_vllm.errors import McpError


class UnusableModel(McpError):
    """The folder holds no causal language model, or one that does not fit the measurement."""


@dataclass(frozen=True)
class Model:
    """``network`` computes in float32, so that only the codec under test rounds."""

    path: Path
    network: Any
    tokenizer: Any

    @classmethod
    def load(cls, path: Path) -> Model:
        """Read a local folder; nothing is fetched."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            network = AutoModelForCausalLM.from_pretrained(
                path, local_files_only=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise UnusableModel(f"cannot load a model from {path}: {error}") from error
        return cls(path, network.eval().requires_grad_(False), tokenizer)

    def tokens_of(self, text: str) -> torch.Tensor:
        """int64 [token], without special ones."""
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return ids[0]

    def context(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [1, token]: begins as the model's contexts do. Without <bos> perplexities of some
        models mean nothing.
        """
        first = self.tokenizer.bos_token_id
        if first is None:
            return tokens[None]
        return torch.cat([torch.tensor([first]), tokens])[None]


Tensors = list[tuple[torch.Tensor, torch.Tensor]]


@torch.inference_mode()
def prefill(model: Model, context: torch.Tensor) -> Tensors:
    """K and V [head, token, channel] of each layer, K after its rotation: what vLLM stores."""
    # A cache made without the model's config keeps every token of the sliding-window layers too.
    cache = DynamicCache()
    model.network(context, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def cache_of(tensors: Tensors) -> DynamicCache:
    """A fresh cache that holds these K and V."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(tensors):
        cache.update(keys[None], values[None], layer)
    return cache


def windows(tokens: torch.Tensor, length: int, stride: int) -> Iterator[torch.Tensor]:
    """Whole windows of a text, each ``stride`` tokens after the one before."""
    for start in range(0, len(tokens) - length + 1, stride):
        yield tokens[start : start + length]


def read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """Text by the name of its file."""
    try:
        return {path.stem: path.read_text(encoding="utf-8") for path in paths}
    except (OSError, UnicodeDecodeError) as error:
        raise McpError(f"cannot read a text: {error}") from error
