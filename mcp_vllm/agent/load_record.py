"""What became of the loads from one source: how good the predictions were, and what they saved.

One for each peer and one for our store, owned by the agent's event loop. The model of a transfer
leaves out what the machine and the protocol add; that is learned here as a factor.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque

from mcp_vllm.agent.load_or_recompute import Choice

# Of the logarithm of the factor, at each load; the first ones count for more.
FACTOR_WEIGHT, PRIOR_LOADS = 0.3, 0.5
MAX_FACTOR = 8.0
NUM_RATIOS = 64


class LoadRecord:
    """See the module's docstring.

    Attributes:
        choices: how often a context was loaded, loaded in part, or computed.
        given_up: loads that were ended because computing was quicker.
        saved_s: by loads against computing, as far as that is measured; negative when they lost.
        factor: actual over modelled time.
        returning: computing was quicker the last time.
        confirmed_s: when a load last ran to its end, on the monotonic clock; 0: never.
    """

    def __init__(self) -> None:
        self.choices: Counter[Choice] = Counter()
        self.given_up = 0
        self.saved_s = 0.0
        self.factor = 1.0
        self.returning = False
        self.confirmed_s = 0.0
        self._num_loads = 0
        self._ratios: deque[float] = deque(maxlen=NUM_RATIOS)

    def chose(self, choice: Choice) -> None:
        self.choices[choice] += 1
        self.returning = choice == "recompute"

    def ran(self, predicted_s: float, modelled_s: float, actual_s: float) -> None:
        """A load from this source alone ended well.

        `predicted_s` is what was expected at its start, `modelled_s` what the model, without the
        factor, gives with what is known of the link now.
        """
        self.confirmed_s = time.monotonic()
        self._ratios.append(predicted_s / actual_s)
        self._num_loads += 1
        weight = max(FACTOR_WEIGHT, 1 / (PRIOR_LOADS + self._num_loads))
        ratio = min(MAX_FACTOR, max(1 / MAX_FACTOR, actual_s / modelled_s))
        self.factor *= (ratio / self.factor) ** weight

    @property
    def accuracy(self) -> float | None:
        """Predicted over actual time, the median of the latest loads; None before the first."""
        return statistics.median(self._ratios) if self._ratios else None
