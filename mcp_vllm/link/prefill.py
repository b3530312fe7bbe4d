"""What it costs an engine to compute a prompt: measured on its own steps, told to the agent.

The engine's connector owns a `PrefillMeter` and notes each step that was mostly prefill;
`PrefillCost` is the model that fits those steps. The agent compares it with the time of a load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np

# Per prefill step, what older steps count for.
FORGETTING = 0.9
# A cost is told once so many tokens were computed.
MIN_TOKENS = 256
# A step counts as at most so much slower or faster than the model says: engines stall now and then.
MAX_SURPRISE = 3.0
# A richer model must fit that much better, or noise would speak for contexts never seen.
MIN_IMPROVEMENT = 0.8
# Features: the step, its tokens, its tokens times the context before each; in these units.
_UNITS = np.array([1.0, 1e3, 1e6])
_MODELS: Sequence[tuple[int, ...]] = ((1,), (0, 1), (1, 2), (0, 1, 2))

Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]


class PrefillCost(msgspec.Struct, frozen=True):
    """Seconds of a step: `step_s + token_s * tokens + context_s * sum of the tokens' contexts`.

    Attributes:
        step_tokens: a longer prompt takes several steps.
    """

    step_s: Seconds
    token_s: Seconds
    context_s: Seconds
    step_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]

    @property
    def is_sound(self) -> bool:
        """Whether it says that tokens take time; what comes from outside may say anything."""
        values = (self.step_s, self.token_s, self.context_s)
        return all(math.isfinite(value) for value in values) and self.token_s > 1e-9

    def seconds(self, start: int, end: int) -> float:
        """To compute the tokens from `start` to `end`, all before them being there."""
        tokens = end - start
        if tokens <= 0:
            return 0.0
        steps = -(-tokens // self.step_tokens)
        contexts = contexts_of(start, end)
        return steps * self.step_s + tokens * self.token_s + contexts * self.context_s

    @property
    def tokens_s(self) -> float:
        """Tokens a second, of a prompt of 4,096 tokens."""
        return 4096 / self.seconds(0, 4096)


# Until an engine of that kind has computed a prompt, here or at a peer: about what one GPU does
# with a model of middling size, so that a slow load is given up early rather than late.
ASSUMED_PREFILL = PrefillCost(step_s=0.0, token_s=1 / 5000, context_s=0.0, step_tokens=1 << 30)


class PrefillMeter:
    """Fits a `PrefillCost` to the latest steps, by least squares of relative errors.

    Owned by the scheduler's thread; noting a step costs some microseconds.
    """

    def __init__(self, step_tokens: int) -> None:
        self._step_tokens = step_tokens
        self._squares = np.zeros((3, 3))
        self._products = np.zeros(3)
        self._weight = 0.0
        self._tokens = 0
        self._cost: PrefillCost | None = None
        self._is_stale = False

    def note(self, tokens: int, contexts: float, seconds: float) -> None:
        """A step computed so many tokens; `contexts` is the sum of the tokens before each."""
        if tokens <= 0 or seconds <= 0:
            return
        known = self._cost
        if known is not None:  # as of the last time that somebody asked: a fit takes longer
            expected = known.step_s + known.token_s * tokens + known.context_s * contexts
            seconds = min(max(seconds, expected / MAX_SURPRISE), expected * MAX_SURPRISE)
        row = np.array([1.0, tokens, contexts]) / _UNITS / seconds
        self._squares = FORGETTING * self._squares + np.outer(row, row)
        self._products = FORGETTING * self._products + row
        self._weight = FORGETTING * self._weight + 1.0
        self._tokens += tokens
        self._is_stale = True

    @property
    def cost(self) -> PrefillCost | None:
        """The model; None until enough was seen."""
        if self._is_stale and self._tokens >= MIN_TOKENS:
            self._cost = self._fit()
            self._is_stale = False
        return self._cost

    def _fit(self) -> PrefillCost | None:
        """The simplest model without negative terms that no richer one clearly beats."""
        best, best_error = None, math.inf
        for terms in _MODELS:
            chosen = np.ix_(terms, terms)
            try:
                values = np.linalg.solve(self._squares[chosen], self._products[list(terms)])
            except np.linalg.LinAlgError:
                continue
            if not np.all(np.isfinite(values)) or values.min() <= 0:
                continue
            # Of the relative errors: what is left of the sum of ones.
            error = max(0.0, self._weight - float(values @ self._products[list(terms)]))
            if error < MIN_IMPROVEMENT * best_error:
                best, best_error = dict(zip(terms, values, strict=True)), error
        if best is None:
            return self._cost
        step_s, token_s, context_s = (best.get(i, 0.0) / _UNITS[i] for i in range(3))
        return PrefillCost(float(step_s), float(token_s), float(context_s), self._step_tokens)


def contexts_of(start: int, end: int) -> float:
    """The sum, over the tokens from `start` to `end`, of the tokens before each."""
    return (end * end - start * start) / 2
