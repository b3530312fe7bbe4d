"""Watches one load: predicts its time, gives it up when computing the rest is quicker, and records
what became of it. Runs in the agent's event loop, beside the load.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mcp_vllm.agent.load_or_recompute import (
    Choice,
    Progress,
    load_seconds,
    should_give_up,
    slack_s,
)
from mcp_vllm.agent.load_sources import LoadSource, PeerSource
from mcp_vllm.agent.peer import Peer
from mcp_vllm.link.prefill import PrefillCost
from mcp_vllm.link.protocol import GroupLayout, group_index
from mcp_vllm.telemetry.agent_metrics import AgentMetrics

logger = logging.getLogger(__name__)

TICK_S = 0.01


@dataclass
class LoadFacts:
    """What a load is to bring, and what it would cost to compute it instead.

    Attributes:
        ends: of each key, the tokens of the context up to the end of its chunk.
        computed_tokens: of the context, in the engine's own prefix cache.
        sources: of each key; None where nobody has it.
        prefill_known: it was measured, here or by a peer, not assumed.
        undecided: nobody has decided yet that these are worth loading.
    """

    keys: Sequence[bytes]
    ends: Sequence[int]
    computed_tokens: int
    groups: Sequence[GroupLayout]
    sources: Sequence[LoadSource | None]
    prefill: PrefillCost
    prefill_known: bool
    lookup_s: float
    undecided: bool


@dataclass
class LoadWatch:
    """See the module's docstring. The load calls `start`, `landed`, and `finish` in the end.

    Attributes:
        gave_up: the load was ended, or never begun, because computing is quicker.
    """

    facts: LoadFacts
    metrics: AgentMetrics
    gave_up: bool = False
    _missing: dict[LoadSource, tuple[int, int]] = field(default_factory=dict)
    _timer: asyncio.TimerHandle | None = None
    _started_s: float | None = None

    def __post_init__(self) -> None:
        facts = self.facts
        for index, source in enumerate(facts.sources):
            if source is not None:
                self._count(source, index, +1)
        self._wanted = dict(self._missing)
        self._predicted_s = load_seconds(self._missing)
        self._begin = self._first_token()
        self._end = max(facts.ends, default=0)
        self._all_s = facts.prefill.seconds(self._begin, self._end)
        self._slack_s = slack_s(self._all_s, facts.lookup_s)
        self._chains = self._chains_of_whole_groups()
        self._landed: set[int] = set()
        self._is_sure = all(source.is_sure for source in self._missing)

    @property
    def saves_tokens(self) -> bool:
        """Whether there is anything that would have to be computed instead."""
        return self._end > self._begin

    def brought_nothing(self, peer: Peer) -> bool:
        """Whether not a byte has come from the peer since the load began."""
        return self._started_s is not None and peer.plan.meter.last_s < self._started_s

    def worth_beginning(self) -> bool:
        """Whether the load is to be tried at all; counts the choice where none was made before."""
        progress = Progress(0.0, 0.0, self._remaining_s(), self._all_s, self._all_s, self._is_sure)
        self.gave_up = should_give_up(progress, self._slack_s)
        if self.facts.undecided:
            choice: Choice = "recompute" if self.gave_up else "load"
            self.metrics.load_decisions.labels(choice).inc()
            for source in self._wanted:
                source.record.chose(choice)
        return not self.gave_up

    def start(self, timeout: asyncio.Timeout) -> None:
        """The load begins; `timeout` ends it at once when it is given up."""
        self._timeout = timeout
        self._started_s = self._last_s = time.monotonic()
        self._tick()

    def landed(self, index: int) -> None:
        """A chunk is in the engine."""
        self._landed.add(index)
        self._last_s = time.monotonic()
        source = self.facts.sources[index]
        if source is not None:
            self._count(source, index, -1)

    def finish(self, num_missing: int) -> None:
        """The load has ended; so many chunks did not come."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._wanted or self._started_s is None:
            return
        elapsed_s = max(1e-6, time.monotonic() - self._started_s)
        if self.gave_up:
            self._lost(elapsed_s)
        elif num_missing == 0:
            self._done(elapsed_s)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        progress = self._progress()
        if should_give_up(progress, self._slack_s):
            self.gave_up = True
            logger.debug("a load was given up: %s", progress)
            self._timeout.reschedule(loop.time())
        else:
            self._timer = loop.call_later(TICK_S, self._tick)

    def _progress(self) -> Progress:
        now_s = time.monotonic()
        assert self._started_s is not None
        last_s = max([self._last_s, *(s.last_s for s in self._missing if s.last_s <= now_s)])
        rest_s = self.facts.prefill.seconds(self._usable_tokens(), self._end)
        return Progress(
            now_s - self._started_s,
            now_s - last_s,
            self._remaining_s(),
            rest_s,
            self._all_s,
            self._is_sure,
        )

    def _remaining_s(self) -> float:
        return load_seconds(self._missing)

    def _done(self, elapsed_s: float) -> None:
        ratio = self._predicted_s / elapsed_s
        kinds = {"peer" if isinstance(s, PeerSource) else "store" for s in self._wanted}
        self.metrics.load_prediction.labels(kinds.pop() if len(kinds) == 1 else "both").observe(
            ratio
        )
        self._save(self._all_s - elapsed_s)
        if len(self._wanted) == 1:
            ((source, share),) = self._wanted.items()
            source.record.ran(self._predicted_s, source.modelled_s(*share), elapsed_s)
        logger.debug(
            "loaded %d tokens in %.3f s, predicted %.3f s; computing them: %.3f s",
            self._end - self._begin,
            elapsed_s,
            self._predicted_s,
            self._all_s,
        )

    def _lost(self, elapsed_s: float) -> None:
        self.metrics.loads_given_up.inc()
        usable_s = self._all_s - self.facts.prefill.seconds(self._usable_tokens(), self._end)
        self._save(usable_s - elapsed_s)
        for source in self._wanted:
            source.record.given_up += 1
            source.record.returning = True

    def _save(self, seconds: float) -> None:
        if not self.facts.prefill_known:
            return
        counter = self.metrics.saved_seconds if seconds > 0 else self.metrics.lost_seconds
        counter.inc(abs(seconds))
        for source in self._wanted:
            source.record.saved_s += seconds / len(self._wanted)

    def _count(self, source: LoadSource, index: int, sign: int) -> None:
        raw_bytes, chunks = self._missing.get(source, (0, 0))
        size = self._group(index).raw_bytes
        self._missing[source] = (raw_bytes + sign * size, chunks + sign)

    def _group(self, index: int) -> GroupLayout:
        return self.facts.groups[group_index(self.facts.keys[index])]

    def _first_token(self) -> int:
        """Where the engine would have to compute from if nothing came."""
        begins = [
            end - self._group(index).tokens
            for index, end in enumerate(self.facts.ends)
            if not self._group(index).window_chunks
        ]
        return max(self.facts.computed_tokens, min(begins, default=0))

    def _chains_of_whole_groups(self) -> list[list[int]]:
        """Of each group, the indices of its keys in the order of the context; nothing where a
        sliding window is missing, too: then nothing can be used before everything has come."""
        if any(self._group(index).window_chunks for index in range(len(self.facts.keys))):
            return []
        chains: dict[int, list[int]] = {}
        for index in sorted(range(len(self.facts.keys)), key=lambda i: -self.facts.ends[i]):
            chains.setdefault(group_index(self.facts.keys[index]), []).append(index)
        return list(chains.values())

    def _usable_tokens(self) -> int:
        """The tokens of the context that the engine has by now."""
        if len(self._landed) == len(self.facts.keys):
            return self._end
        for chain in self._chains:  # the next to come is last
            while chain and chain[-1] in self._landed:
                chain.pop()
        reached = [
            self.facts.ends[chain[-1]] - self._group(chain[-1]).tokens if chain else self._end
            for chain in self._chains
        ]
        return max(self._begin, min(reached, default=self._begin))
