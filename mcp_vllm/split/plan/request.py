"""What a measuring run is asked for: the model's first layers, and which steps to time."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from mcp_vllm.split.plan.cost import Load
from mcp_vllm.split.plan.shape import Dtype

# Enough for each kind of layer in models that mix them (Gemma repeats after six).
MOST_LAYERS = 8
_SHORTEST = 128
_ANSWER = 32  # tokens that a measured request may generate


class MeasureRequest(BaseModel):
    """Attributes:
    layers: how many of the model's first layers are run.
    batch, budget, context: the largest steps: requests, tokens, tokens of a request.
    repeat: how often each shape is run; the lower quartile counts.
    memory_bytes: what the machine is said to have; None: what is free.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    dtype: Dtype
    layers: int = Field(ge=1)
    batch: int = Field(ge=1, le=1024)
    budget: int = Field(ge=16)
    context: int = Field(ge=64)
    repeat: int = Field(default=5, ge=1)
    memory_bytes: int | None = None

    @classmethod
    def of(
        cls, model: str, dtype: Dtype, num_layers: int, load: Load, memory_bytes: int | None = None
    ) -> MeasureRequest:
        """What is needed to predict `load`."""
        return cls(
            model=model,
            dtype=dtype,
            layers=min(num_layers, MOST_LAYERS),
            batch=max(load.batch, 2),
            budget=load.budget,
            context=max(load.context, _SHORTEST),
            memory_bytes=memory_bytes,
        )

    def shapes(self) -> list[tuple[int, int]]:
        """(requests, prompt) of every run: lengths from short to the longest, one request and
        the whole batch, prompts that need several steps among them."""
        longest = self.context - _ANSWER
        prompts = {min(each, longest) for each in (17, 64, 160, 384, self.budget, longest)}
        batches = sorted({2, max(2, self.batch // 2), self.batch})
        many = [(batch, min(prompt, longest)) for batch in batches for prompt in (32, longest // 2)]
        return [*((1, prompt) for prompt in sorted(prompts)), *many]
