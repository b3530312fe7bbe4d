"""What each decoder layer of a model computes, reads and keeps: pure numbers, no weights, no vLLM.

`read.py` makes these from a model's files; the cost model multiplies them by a machine's rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mcp_vllm.split.activations import FormCost

Dtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class Work:
    """One step: `requests` requests with `tokens` new tokens each, after which each has `context`.

    A decode step has one token a request; everything else is prefill.
    """

    requests: int
    tokens: int
    context: int

    def __post_init__(self) -> None:
        if not (self.requests >= 1 and 1 <= self.tokens <= self.context):
            raise ValueError(f"a step of {self.requests} x {self.tokens} at {self.context}")

    @property
    def num_tokens(self) -> int:
        return self.requests * self.tokens

    @property
    def is_decode(self) -> bool:
        return self.tokens == 1


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    Attributes:
        parameters: all of them, every expert included.
        weight_bytes: of all of them as stored.
        linear_flops: a token, in products with weights; of the experts only those that are chosen.
        attention_flops: a token and a token of context, for a decode step.
        prefill_attention_flops: the same in prefill (MLA expands its latents there).
        kv_bytes: of K and V, or of the latent, a token.
        window: tokens that attention looks back at most; None: all.
        expert_bytes: the part of `weight_bytes` that belongs to routed experts.
        chosen: the part of the routed experts that one token uses, 0 to 1.
    """

    parameters: int
    weight_bytes: int
    linear_flops: float
    attention_flops: float
    prefill_attention_flops: float
    kv_bytes: int
    window: int | None = None
    expert_bytes: int = 0
    chosen: float = 1.0

    def flops(self, work: Work) -> float:
        """Of one step."""
        attention = self.attention_flops if work.is_decode else self.prefill_attention_flops
        return work.num_tokens * (self.linear_flops + attention * self._seen(work))

    def bytes_read(self, work: Work) -> float:
        """Weights and KV that one step reads; of the experts those that any token is sent to."""
        used = 1.0 - (1.0 - self.chosen) ** work.num_tokens
        weights = self.weight_bytes - self.expert_bytes + self.expert_bytes * used
        return weights + work.requests * self.kv_bytes * self.kept_tokens(work.context)

    def kept_tokens(self, context: int) -> int:
        """Tokens whose KV matters at this context."""
        return context if self.window is None else min(context, self.window)

    def _seen(self, work: Work) -> float:
        """Tokens that a new token looks at, itself included, on average over the new ones."""
        first = work.context - work.tokens + 1
        if self.window is None or work.context <= self.window:
            return (first + work.context) / 2
        growing = max(0, self.window - first)  # tokens that do not fill the window yet
        return (
            growing * (first + self.window - 1) / 2 + (work.tokens - growing) * self.window
        ) / work.tokens


@dataclass(frozen=True)
class ModelShape:
    """A model as planning sees it.

    Attributes:
        name: the folder's name.
        dtype: of activations and KV.
        hidden: width of an activation.
        outer_bytes: weights that always stay local: embedding, last norm, head (tied: once).
        outer_parameters: their number.
        head_flops: of the head, a token whose logits are needed.
        forms: what activations cost, by form on the wire (activations.FORMS).
    """

    name: str
    dtype: Dtype
    hidden: int
    layers: tuple[LayerShape, ...]
    outer_bytes: int
    outer_parameters: int
    head_flops: float
    forms: Mapping[str, FormCost]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def parameters(self) -> int:
        return self.outer_parameters + sum(each.parameters for each in self.layers)
