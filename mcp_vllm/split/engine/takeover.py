"""Who runs the span's layers after a stage was lost, or when another split pays more.

In this order: the same stage, with more patience, if it was alive and slow; the same stage with
fewer layers, if its memory did not suffice; the next stages; the engine itself. Owned by the
executor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

from mcp_vllm.config.split import SplitConfig
from mcp_vllm.split import spans
from mcp_vllm.split.engine.held import HeldLayers
from mcp_vllm.split.errors import SplitError, StageLost
from mcp_vllm.split.link import Link, Stages
from mcp_vllm.split.spans import Span

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AtStage:
    """A stage, and the layers that it shall have; `again`: our lease there has just ended."""

    stage: str
    span: Span
    again: bool = False


# None: the engine itself has all layers.
Way = AtStage | None


class Takeover:
    """`span` stays what was configured, until memory or a new plan changes it."""

    def __init__(self, config: SplitConfig, stages: Stages, held: HeldLayers) -> None:
        self._config = config
        self._stages = stages
        self._held = held
        self._span = config.span
        self._given_time: str | None = None

    def note_success(self) -> None:
        """A step was answered: a stage that was given more time has used it well."""
        self._given_time = None

    def after(self, lost: StageLost | None, stage: str | None) -> Link | None:
        """A lease for the layers that are elsewhere from now on; None: all of them are here.

        Args:
            lost: why `stage` is; None: there was none before either.

        Raises:
            SplitError: nobody can run the layers; says why of each.
        """
        failures = []
        for way in self._ways(lost, stage):
            try:
                return self.take(way)
            except SplitError as error:
                failures.append(str(error))
                logger.warning("%s", error)
        reason = "; ".join(failures)
        if not self._config.local_fallback:
            reason += "; local_fallback is off"
        raise SplitError(reason)

    def take(self, way: Way) -> Link | None:
        """Raises SplitError: this way is none; what is held has not changed."""
        started = time.monotonic()
        if way is None:
            self._held.move(None)
            link, where = None, "local layers"
        else:
            self._held.check_room(way.span)
            link = self._leased(way)
            where = f"stage {way.stage}"
            self._span = way.span
        logger.warning(
            "layers %s: %s took over after %.2f s; running requests are recomputed",
            spans.text(self._span),
            where,
            time.monotonic() - started,
        )
        return link

    def _ways(self, lost: StageLost | None, stage: str | None) -> Iterator[Way]:
        if lost is not None and stage is not None:
            if lost.cause == "slow" and stage != self._given_time:
                self._given_time = stage
                self._stages.give_time(stage)
                yield AtStage(stage, self._span, again=True)
            fewer = spans.smaller(self._span)
            if lost.cause == "memory" and fewer is not None:
                yield AtStage(stage, fewer, again=True)
        for each in self._stages.in_order():
            yield AtStage(each, self._span)
        if self._config.local_fallback:
            yield None

    def _leased(self, way: AtStage) -> Link:
        stage, span = way.stage, way.span
        link = (self._stages.dial_again if way.again else self._stages.dial)(stage, span)
        try:
            if link.welcome.kv_specs != self._held.kv_specs(span):
                raise SplitError(f"stage {stage} has other attention layers")
            link.init_kv(self._held.kv_init(span), self._config.connect_ms / 1000)
            if span != self._held.span:
                self._held.move(span)
        except BaseException:
            link.close()
            raise
        return link
