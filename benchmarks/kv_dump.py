"""Writes the KV cache of a local Hugging Face model over the texts beside this file.

    python benchmarks/kv_dump.py MODEL_FOLDER OUTPUT_FOLDER [--max-tokens 1024]

One file per text, ``<text>.npy``: uint16 bit patterns of bf16, [layer, K or V, head, token,
channel], K after RoPE: the values that vLLM stores. Runs on the CPU and reads local files only.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

TEXTS = sorted(Path(__file__).with_name("texts").glob("*.txt"))


@torch.inference_mode()
def kv_of_text(model, tokenizer, text: str, max_tokens: int) -> np.ndarray:
    """uint16 [layer, 2, head, token, channel] of one prefill."""
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :max_tokens]
    # A cache made without the model's config keeps every token of the sliding-window layers too.
    cache = DynamicCache()
    model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return torch.stack(layers).view(torch.int16).numpy().view(np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-tokens", type=int, default=1024)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, local_files_only=True, dtype=torch.bfloat16
    )
    for text in TEXTS:
        kv = kv_of_text(model, tokenizer, text.read_text(), args.max_tokens)
        np.save(args.output / f"{text.stem}.npy", kv)
        print(f"{text.stem}: {kv.shape}")


if __name__ == "__main__":
    main()
