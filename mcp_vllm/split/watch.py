"""The round trip to stages that are not used: whether going back to one would pay.

A thread of its own, since a stage that is gone makes whoever asks wait. Others read `round_trips`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from mcp_vllm.split.errors import SplitError

logger = logging.getLogger(__name__)


class Watch:
    """Runs from the beginning to `close`.

    Args:
        ping: the seconds of a round trip to a stage; raises SplitError.

    Attributes:
        round_trips: seconds by stage, of those that answered last time; replaced as a whole.
    """

    def __init__(self, stages: Sequence[str], ping: Callable[[str], float], every_s: float) -> None:
        self.round_trips: Mapping[str, float] = {}
        self._stages = stages
        self._ping = ping
        self._every_s = every_s
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="stage-watch", daemon=True).start()

    def close(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            found = {}
            for stage in self._stages:
                try:
                    found[stage] = self._ping(stage)
                except SplitError as error:
                    logger.debug("stage %s does not answer: %s", stage, error)
            self.round_trips = found
