"""Text that the model writes itself: near to what it was trained on, in the languages it knows.

A calibration from one kind of text costs the others most. Called by `mcp-vllm codec calibrate`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mcp_vllm.quality.model import Model

# First words of chats, prose, code and data, in several languages; the model goes on by chance.
OPENERS = (
    "User: Hello",
    "今天",
    "def main():\n",
    "In this paper",
    '{"items": [',
    "用户：你好",
    "Once upon a time",
    "Der",
    "Q: How do I",
    "中国的历史",
    "#include <stdio.h>\n",
    "Le",
    "The company",
    "日本の",
    "## Usage\n",
    "Привет",
)
_SEED = 0


@torch.inference_mode()
def own_tokens(
    model: Model, num_windows: int, num_tokens: int, on_step: Callable[[int, int], None]
) -> list[torch.Tensor]:
    """Windows of int64 [num_tokens], drawn at temperature 1; ``on_step`` hears of whole windows."""
    windows: list[torch.Tensor] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        while len(windows) < num_windows:
            openers = [OPENERS[i % len(OPENERS)] for i in range(len(windows), num_windows)]
            windows += _continued(model, openers[: len(OPENERS)], num_tokens)
            on_step(len(windows), num_windows)
    return windows


def _continued(model: Model, openers: list[str], num_tokens: int) -> list[torch.Tensor]:
    """Each opener, and what the model adds, int64 [num_tokens] without the first special token."""
    begun = [model.context(model.tokens_of(opener))[0] for opener in openers]
    longest = max(map(len, begun))
    # Shorter ones are padded on the left, where a mask hides it.
    padded = torch.stack([torch.nn.functional.pad(ids, (longest - len(ids), 0)) for ids in begun])
    mask = torch.stack([torch.arange(longest) >= longest - len(ids) for ids in begun]).long()
    written = model.network.generate(
        padded,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    num_special = len(model.context(torch.empty(0, dtype=torch.int64))[0])
    return [
        row[longest - len(ids) + num_special :][:num_tokens]
        for row, ids in zip(written, begun, strict=True)
    ]
