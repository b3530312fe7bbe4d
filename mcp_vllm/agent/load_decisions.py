"""Decides for the requests of one engine whether its context is loaded or computed.

Called by the engine's port, at the whole lookup of a request and at each of its loads. Without a
decision (`agent.load_policy: always`, or an engine that does not say what its chunks hold)
everything that is found is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.load_or_recompute import ChainGroup, Decision, decide, shares
from mcp_vllm.agent.load_sources import LoadSource, SourcesOf
from mcp_vllm.agent.load_watch import LoadFacts, LoadWatch
from mcp_vllm.agent.peer import Peer
from mcp_vllm.agent.reader import Reader
from mcp_vllm.link.prefill import ASSUMED_PREFILL, PrefillCost
from mcp_vllm.link.protocol import GroupLayout, Load, Lookup, group_index

logger = logging.getLogger(__name__)

Holders = Mapping[bytes, Sequence[Peer]]


class LoadDecisions:
    """One per engine that is connected; owned by the agent's event loop."""

    def __init__(
        self, context: AgentContext, namespace: bytes, groups: Sequence[GroupLayout]
    ) -> None:
        self._context = context
        self._namespace = namespace
        self._groups = groups

    @property
    def _is_off(self) -> bool:
        return self._context.config.agent.load_policy == "always"

    def learn(self, prefill: PrefillCost | None) -> None:
        """What an engine of this kind has measured."""
        if prefill is not None and prefill.is_sound:
            self._context.prefills[self._namespace] = prefill

    def decide(self, lookup: Lookup, holders: Holders, reader: Reader) -> Decision | None:
        """How much of the looked up chain to load; None: what there is."""
        indices = {group_index(key) for key in lookup.keys}
        if self._is_off or not lookup.whole or not all(self._groups[i].tokens for i in indices):
            return None
        sources = SourcesOf(self._context, self._namespace, holders, reader)
        chains: dict[int, list[bytes]] = {index: [] for index in indices}
        for key in lookup.keys:
            chains[group_index(key)].append(key)
        groups: list[ChainGroup[LoadSource]] = [
            ChainGroup(layout.tokens, layout.window_chunks, layout.raw_bytes, found)
            for layout, found in (
                (self._groups[index], [sources.of(key) for key in keys])
                for index, keys in chains.items()
            )
        ]
        prefill, _ = self._prefill(holders)
        used = {source for group in groups for _, source in group.runs}
        returning = any(source.record.returning for source in used)
        decision = decide(groups, prefill, returning=returning)
        if decision is None:
            return None
        self._context.metrics.load_decisions.labels(decision.choice).inc()
        kept = shares(groups, decision.end_tokens or decision.reach_tokens)
        for record in {source.record for source in kept}:
            record.chose(decision.choice)
        logger.debug("request %s: %s: %s", lookup.request_id, decision.choice, decision)
        return decision

    def hide(self, lookup: Lookup, decision: Decision, present: bytearray) -> None:
        """Turn what is not to be loaded into misses."""
        positions: dict[int, int] = {}
        for at, key in enumerate(lookup.keys):
            index = group_index(key)
            begin = positions.get(index, 0)
            positions[index] = begin + self._groups[index].tokens
            if begin >= decision.end_tokens:
                present[at] = 0

    def watch(
        self, load: Load, holders: Holders, reader: Reader, decided: bool
    ) -> LoadWatch | None:
        """The watch over a load; None where the load is not to be judged."""
        known = load.ends and all(self._groups[group_index(key)].tokens for key in load.keys)
        if self._is_off or not known:
            return None
        sources = SourcesOf(self._context, self._namespace, holders, reader)
        prefill, prefill_known = self._prefill(holders)
        facts = LoadFacts(
            load.keys,
            load.ends,
            load.computed_tokens,
            self._groups,
            [sources.of(key) for key in load.keys],
            prefill,
            prefill_known,
            self._context.config.agent.lookup_ms / 1000,
            not decided,
        )
        watch = LoadWatch(facts, self._context.metrics)
        return watch if watch.saves_tokens else None

    def _prefill(self, holders: Holders) -> tuple[PrefillCost, bool]:
        """What computing costs this engine, and whether anybody has measured it."""
        peers = (peer for those in holders.values() for peer in those)
        prefill = known_prefill(self._context, self._namespace, peers)
        return prefill, prefill is not ASSUMED_PREFILL


def known_prefill(context: AgentContext, namespace: bytes, peers: Iterable[Peer]) -> PrefillCost:
    """What computing costs an engine of that kind: as it measured, or else as one of the peers has
    heard; ASSUMED_PREFILL where nobody has measured."""
    own = context.prefills.get(namespace)
    if own is not None:
        return own
    heard = (peer.plan.prefill_of(namespace) for peer in peers)
    return next((each for each in heard if each is not None), ASSUMED_PREFILL)
