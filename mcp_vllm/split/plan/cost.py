"""How long a step takes under a split, and what requests see of it.

    step = rest + local layers + [resuming + stage + link]

    time to first token = the prefill steps of one prompt on an idle engine
    time per token      = one decode step of `batch` requests at the context

Times are the engine's: HTTP and the tokenizer come on top, for every split the same.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np

from mcp_vllm.split.plan.fit import Array, LinkFit, MachineFit
from mcp_vllm.split.plan.shape import ModelShape, Work

Split = tuple[int, int]


@dataclass(frozen=True)
class Load:
    """What is planned for.

    Attributes:
        prompt: tokens of a prompt.
        answer: tokens of an answer.
        batch: requests that generate at once.
        budget: tokens that a step takes at most (vLLM's max_num_batched_tokens).
    """

    prompt: int
    answer: int
    batch: int
    budget: int

    @property
    def context(self) -> int:
        """Tokens of a request at its end."""
        return self.prompt + self.answer

    @property
    def decode(self) -> Work:
        """The typical decode step: in the middle of the answer."""
        return Work(self.batch, 1, self.prompt + max(1, self.answer // 2))

    @property
    def prefill(self) -> list[Work]:
        """The steps of one prompt."""
        ends = [*range(self.budget, self.prompt, self.budget), self.prompt]
        return [Work(1, end - start, end) for start, end in itertools.pairwise([0, *ends])]


class CostModel:
    """Two machines, a link, a model; `split` None means everything local."""

    def __init__(
        self,
        shape: ModelShape,
        local: MachineFit,
        stage: MachineFit | None = None,
        link: LinkFit | None = None,
        form: str = "raw",
    ) -> None:
        self.shape = shape
        self._local = local
        self._stage = stage
        self._link = link
        self._form = shape.forms[form]
        self._prefix = cache(self._prefix_sums)

    def step_s(self, work: Work, split: Split | None) -> float:
        """Seconds of one step."""
        local = self._prefix(work, False)
        seconds = self._local.rest_s(work) + float(local[-1])
        if split is None:
            return seconds
        assert self._stage is not None
        assert self._link is not None
        first, end = split
        remote = self._prefix(work, True)
        return (
            seconds
            - float(local[end] - local[first])
            + float(remote[end] - remote[first])
            + self._stage.rest_s(work)
            + self._local.resume_s
            + self._stage.resume_s
            + self._link.time_s(2 * work.num_tokens * self._form.token_bytes)
            + 2 * (work.num_tokens * self._form.token_s + self._form.way_s)
        )

    def ttft_s(self, load: Load, split: Split | None) -> float:
        return sum(self.step_s(work, split) for work in load.prefill)

    def token_s(self, load: Load, split: Split | None) -> float:
        return self.step_s(load.decode, split)

    def local_bytes(self, load: Load, split: Split | None) -> int:
        """Weights and KV that stay, for `batch` requests at their end."""
        away = 0 if split is None else self.stage_bytes(load, split)
        return self.shape.outer_bytes + self._bytes(load, 0, self.shape.num_layers) - away

    def stage_bytes(self, load: Load, split: Split) -> int:
        return self._bytes(load, *split)

    def budget_within(self, load: Load, split: Split | None, step_s: float) -> int | None:
        """The largest token budget (a multiple of 16) whose prefill steps, at the end of the
        prompt, take at most `step_s`; None: not even 16 tokens do."""
        fitting = None
        for tokens in range(16, max(load.prompt, 16) + 16, 16):
            tokens = min(tokens, load.prompt)
            if self.step_s(Work(1, tokens, load.prompt), split) > step_s:
                break
            fitting = tokens
        return fitting

    def _bytes(self, load: Load, first: int, end: int) -> int:
        layers = self.shape.layers[first:end]
        return sum(
            each.weight_bytes + load.batch * each.kept_tokens(load.context) * each.kv_bytes
            for each in layers
        )

    def _prefix_sums(self, work: Work, at_stage: bool) -> Array:
        """[layers + 1]: the time of the layers before each."""
        machine = self._stage if at_stage else self._local
        assert machine is not None
        rates = machine.rates(work)
        times = [rates.layer_time_s(layer, work) for layer in self.shape.layers]
        return np.concatenate([[0.0], np.cumsum(times)])
