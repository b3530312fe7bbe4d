"""When another split would be quicker for good: decided from what the decode steps of now take.

A step with `n` layers at the stage takes, beside what no split changes,

    (layers - n) * local + n * remote + link

so the best `n` is at an end of what the stage holds and what memory allows. What is measured counts
by its median over a window, and a change must promise a good part of the step in several windows
one after the other: a busy moment changes nothing. Owned by the executor; no vLLM here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from mcp_vllm.split.spans import Span

# A change has to save this part of a step...
GAIN = 0.2
# ...in so many windows one after the other, each with at least so many steps.
WINDOWS = 3
STEPS = 20


@dataclass(frozen=True)
class DecodeStep:
    """Seconds of one decode step.

    Attributes:
        whole: from the scheduler's decision to the model's answer.
        layer: of one of the engine's own layers.
        stage: of the stage's layers together.
        link: what the activations took beyond that, there and back.
    """

    whole: float
    layer: float
    stage: float
    link: float


@dataclass(frozen=True)
class Change:
    """The layers that should be elsewhere (None: none), and the step's seconds before and after."""

    span: Span | None
    now_s: float
    then_s: float


class Replanner:
    """One split that serves; `forget` after it has changed.

    Args:
        window_s: how long a window is.
        fits: whether the engine could hold all layers but those of a span (None: all of them).
    """

    def __init__(self, window_s: float, fits: Callable[[Span | None], bool]) -> None:
        self._window_s = window_s
        self._fits = fits
        self.forget()

        self._remote_s: float | None = None

    def forget(self) -> None:
        """Begin anew; what a layer took at the stage is still known."""
        self._steps: list[DecodeStep] = []
        self._began: float | None = None
        self._wanted: list[Span | None] = []

    def observe(
        self, step: DecodeStep, now: float, span: Span, held: Span, may_be_local: bool
    ) -> Change | None:
        """Take note of a step; what should change, if that has been clear for long enough.

        Args:
            now: seconds of a monotonic clock.
            span: the layers that are elsewhere; held: those that the stage has.
            may_be_local: whether the engine may hold all layers.
        """
        return self._decide(step, now, lambda: self._best(span, held, may_be_local))

    def observe_at_home(self, step: DecodeStep, now: float, span: Span) -> Change | None:
        """The same while all layers are here and `step.link` is the round trip to a stage that
        would have `span`."""
        return self._decide(step, now, lambda: self._away(span))

    def _decide(
        self, step: DecodeStep, now: float, better: Callable[[], Change | None]
    ) -> Change | None:
        if self._began is None:
            self._began = now
        self._steps.append(step)
        if now - self._began < self._window_s or len(self._steps) < STEPS:
            return None
        change = better()
        self._steps, self._began = [], None
        if change is None:
            self._wanted = []
            return None
        if self._wanted and self._wanted[-1] != change.span:
            self._wanted = []
        self._wanted.append(change.span)
        return change if len(self._wanted) >= WINDOWS else None

    def _best(self, span: Span, held: Span, may_be_local: bool) -> Change | None:
        typical = self._typical()
        whole, layer, link = typical.whole, typical.layer, typical.link
        length = span[1] - span[0]
        remote = self._remote_s = typical.stage / length
        candidates: list[Span | None] = [(held[0], end) for end in range(held[0] + 1, held[1] + 1)]
        if may_be_local:
            candidates.append(None)

        def seconds(other: Span | None) -> float:
            count = 0 if other is None else other[1] - other[0]
            return whole + (count - length) * (remote - layer) - (link if other is None else 0.0)

        for best in sorted(candidates, key=seconds):
            if seconds(best) > (1 - GAIN) * whole:
                return None
            if best != span and self._fits(best):
                return Change(best, whole, max(0.0, seconds(best)))
        return None

    def _away(self, span: Span) -> Change | None:
        if self._remote_s is None or not self._fits(span):
            return None
        typical = self._typical()
        saved = (span[1] - span[0]) * (typical.layer - self._remote_s) - typical.link
        if saved < GAIN * typical.whole:
            return None
        return Change(span, typical.whole, max(0.0, typical.whole - saved))

    def _typical(self) -> DecodeStep:
        return DecodeStep(
            *(
                statistics.median(getattr(each, name) for each in self._steps)
                for name in ("whole", "layer", "stage", "link")
            )
        )
