"""A circuit breaker: a peer that keeps failing is left alone, and tried again now and then.

State: closed (asked normally); open (not asked until the back-off has passed); half-open (one trial
is under way; its outcome closes the breaker or opens it for twice as long).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

FAILURES_TO_OPEN = 2
BACKOFF_MIN_S = 1.0
BACKOFF_MAX_S = 30.0


@dataclass
class Breaker:
    """One peer's breaker; `clock` returns seconds and only moves forward."""

    clock: Callable[[], float] = time.monotonic
    _failures: int = 0
    _backoff_s: float = BACKOFF_MIN_S
    _open_until_s: float | None = None
    _on_trial: bool = False

    @property
    def is_closed(self) -> bool:
        return self._open_until_s is None

    def allow(self) -> bool:
        """Whether to ask now. Asking while half-open is the one trial."""
        if self._open_until_s is None:
            return True
        now_s = self.clock()
        if now_s < self._open_until_s:
            return False
        self._open_until_s = now_s + self._backoff_s
        self._on_trial = True
        return True

    def trip(self) -> None:
        """Open at once: the peer is known to be gone."""
        self._failures = max(self._failures, FAILURES_TO_OPEN)
        self._on_trial = False
        if self._open_until_s is None:
            self._open_until_s = self.clock() + self._backoff_s

    def succeeded(self) -> None:
        self._failures = 0
        self._backoff_s = BACKOFF_MIN_S
        self._open_until_s = None
        self._on_trial = False

    def failed(self) -> None:
        self._failures += 1
        if self._on_trial:
            self._on_trial = False
            self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)
        elif self._open_until_s is not None or self._failures < FAILURES_TO_OPEN:
            return  # asked before it opened: many requests failing at once are one outage
        self._open_until_s = self.clock() + self._backoff_s
