"""How long one piece of work has the event loop before others have their turn."""

from __future__ import annotations

import asyncio
import time

TURN_S = 0.002


class Turn:
    """From when it is made; work of many small steps asks between them whether it is over."""

    def __init__(self) -> None:
        self._ends_s = time.monotonic() + TURN_S

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._ends_s

    async def pass_on(self) -> None:
        """Let the others run, and begin anew."""
        await asyncio.sleep(0)
        self._ends_s = time.monotonic() + TURN_S
