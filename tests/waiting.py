"""Waiting on conditions, never on a clock."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(what: str, condition: Callable[[], T], deadline_s: float = 20.0) -> T:
    """The first true value of `condition`; fails naming `what` when the deadline passes."""
    until_s = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < until_s, f"not within {deadline_s} s: {what}"
        time.sleep(0.02)
