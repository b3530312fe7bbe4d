"""Which of the scheduler's steps were prefill, and how long each took.

Called by the connector, in the scheduler's thread, when a step was scheduled and when its output is
there. Steps end in the order in which they were scheduled, also where the next one is scheduled
before the last has ended; so a step begins when it was scheduled or when the one before it ended,
whichever is later, and idle time is nobody's.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from mcp_vllm.link.prefill import PrefillMeter, contexts_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

# A step says something about prefill when it has so many prompt tokens, and so many for each
# request that only decodes.
MIN_STEP_TOKENS = 32
MIN_TOKENS_PER_DECODE = 8
# More steps than any pipeline has under way: their ends are not being told, so none are kept.
MAX_UNDER_WAY = 64


class _Step(NamedTuple):
    scheduled_s: float
    tokens: int
    contexts: float


class PrefillSteps:
    """See the module's docstring."""

    def __init__(self, meter: PrefillMeter) -> None:
        self._meter = meter
        self._under_way: deque[_Step] = deque()
        self._last_end_s = 0.0

    def scheduled(self, output: SchedulerOutput) -> None:
        if len(self._under_way) >= MAX_UNDER_WAY:
            self._under_way.clear()
        tokens, contexts = _prefill_of(output)
        self._under_way.append(_Step(time.perf_counter(), tokens, contexts))

    def ended(self) -> None:
        """The output of the oldest step that is under way has come."""
        if not self._under_way:
            return
        step, now_s = self._under_way.popleft(), time.perf_counter()
        begun_s = max(step.scheduled_s, self._last_end_s)
        self._last_end_s = now_s
        if step.tokens:
            self._meter.note(step.tokens, step.contexts, now_s - begun_s)


def _prefill_of(output: SchedulerOutput) -> tuple[int, float]:
    """Prompt tokens of a step and the sum of their contexts; 0 where the step is something else."""
    counts = output.num_scheduled_tokens
    if output.total_num_scheduled_tokens < len(counts) + MIN_STEP_TOKENS - 1:
        return 0, 0.0
    spans = [(new.num_computed_tokens, counts[new.req_id]) for new in output.scheduled_new_reqs]
    cached = output.scheduled_cached_reqs
    for request_id, start, num_outputs in zip(
        cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
    ):
        if num_outputs == 0 or request_id in cached.resumed_req_ids:
            spans.append((start, counts[request_id]))
    tokens = sum(count for _, count in spans)
    num_decodes = len(counts) - len(spans)
    if tokens < max(MIN_STEP_TOKENS, MIN_TOKENS_PER_DECODE * num_decodes):
        return 0, 0.0
    return tokens, sum(contexts_of(start, start + count) for start, count in spans)
