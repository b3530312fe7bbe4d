"""At which engine a context is cheapest to go on with: what each agent has of it, as announced, and
what bringing or computing the rest would take there. For gateways; nobody is asked.

The cost model is that of loads (`load_or_recompute`). Links between two peers were never measured
here: they count as the slower of this agent's own links to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mcp_vllm.agent.chunk_set import hash_as
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.load_decisions import known_prefill
from mcp_vllm.agent.load_or_recompute import ChainGroup, decide
from mcp_vllm.agent.load_sources import PeerSource, peer_source
from mcp_vllm.agent.peer import Peer
from mcp_vllm.agent.peers import Peers
from mcp_vllm.link.prefill import PrefillCost
from mcp_vllm.link.protocol import GroupLayout, group_index
from mcp_vllm.session.api import Placement
from mcp_vllm.session.manifest import SessionKey

# The name of the agent that is asked.
HERE = ""


class _There:
    """The chunk is where the context goes on."""

    def seconds(self, raw_bytes: int, num_chunks: int) -> float:
        return 0.0


_THERE = _There()


@dataclass(eq=False)
class _Link:
    """From one agent to another, over links that were measured from here."""

    ends: Sequence[PeerSource]

    def seconds(self, raw_bytes: int, num_chunks: int) -> float:
        return max(end.seconds(raw_bytes, num_chunks) for end in self.ends)


def announced(context: AgentContext, peers: Peers, key: SessionKey) -> list[Placement]:
    """Of a session that is not here: at each agent, by what peers have announced of it. Its blocks
    are not known, so who does not have it is taken to compute all of it."""
    states = {peer.name: state for peer, state in peers.holders_of(key)}
    if not states:
        return []
    tokens = max(state.num_tokens for state in states.values())
    prefill = known_prefill(context, next(reversed(context.groups), b""), list(peers))
    names = [HERE, *(peer.name for peer in peers if not peer.is_down)]
    held = {name: states[name].num_tokens if name in states else 0 for name in names}
    return sorted(
        (
            Placement(
                agent=name,
                held_chunks=0,
                held_tokens=there,
                num_tokens=tokens,
                cost_s=round(prefill.seconds(there, tokens), 6),
                recompute_s=round(prefill.seconds(0, tokens), 6),
            )
            for name, there in held.items()
        ),
        key=lambda each: each.cost_s,
    )


@dataclass
class PlacementsOf:
    """Placements of one tenant's contexts of one kind of engine (`namespace`)."""

    context: AgentContext
    peers: Peers
    tenant: str
    namespace: bytes

    def of(self, keys: Sequence[bytes], num_tokens: int) -> list[Placement]:
        """For each agent, the cheapest first; of a context that has these chunks, each group's in
        order of position, and so many tokens (0: as many as the chunks hold).

        Empty where no engine of that kind has connected here: then nothing is known of its chunks.
        """
        layouts = self.context.groups.get(self.namespace, ())
        if any(group_index(key) >= len(layouts) or not layouts[group_index(key)].tokens
               for key in keys):  # fmt: skip
            return []
        chains = [[key for key in keys if group_index(key) == g] for g in range(len(layouts))]
        chained = [key for chain in chains for key in chain]
        held = self._held(chained)
        reach = max((len(c) * g.tokens for c, g in zip(chains, layouts, strict=True)), default=0)
        tokens = num_tokens or reach
        prefill = known_prefill(self.context, self.namespace, list(self.peers))
        links = {peer.name: self._link(peer) for peer in self.peers}
        found = []
        for name, has in held.items():
            sources = _Sources(name, held, links)
            groups = _grouped(chains, layouts, [sources.of(i) for i in range(len(chained))])
            own = _grouped(chains, layouts, [_THERE if each else None for each in has])
            found.append(
                Placement(
                    agent=name,
                    held_chunks=int(np.count_nonzero(has)),
                    held_tokens=min(tokens, _reach(own, prefill)),
                    num_tokens=tokens,
                    cost_s=round(_cost_s(groups, prefill, tokens), 6),
                    recompute_s=round(prefill.seconds(0, tokens), 6),
                )
            )
        return sorted(found, key=lambda each: (each.cost_s, -each.held_tokens))

    def _held(self, keys: Sequence[bytes]) -> dict[str, np.ndarray]:
        """For each agent, which of the chunks it has that the tenant can use."""
        reader = self.context.reader(self.tenant)
        here = self.context.readable_flags(reader, self.namespace, keys)
        held = {HERE: np.frombuffer(bytes(here), dtype=bool)}
        hashes = hash_as(reader.tenants, keys)
        for peer in self.peers:
            if not peer.is_down:
                held[peer.name] = peer.directory.find_any(self.namespace, hashes, reader)
        return held

    def _link(self, peer: Peer) -> PeerSource:
        return peer_source(self.context, peer, self.namespace, ())


@dataclass
class _Sources:
    """Where the chunks would come from, for one agent."""

    agent: str
    held: Mapping[str, np.ndarray]
    links: Mapping[str, PeerSource]

    def __post_init__(self) -> None:
        others = [name for name in self.held if name != self.agent]
        self._from = {name: self._between(name) for name in others}

    def of(self, index: int) -> _There | _Link | None:
        if self.held[self.agent][index]:
            return _THERE
        holders = [link for name, link in self._from.items() if self.held[name][index]]
        return min(holders, key=lambda link: link.seconds(1 << 20, 1), default=None)

    def _between(self, holder: str) -> _Link:
        return _Link([self.links[name] for name in (self.agent, holder) if name != HERE])


def _grouped(
    chains: Sequence[Sequence[bytes]],
    layouts: Sequence[GroupLayout],
    sources: Sequence[_There | _Link | None],
) -> list[ChainGroup[_There | _Link]]:
    groups: list[ChainGroup[_There | _Link]] = []
    start = 0
    for chain, layout in zip(chains, layouts, strict=True):
        part = sources[start : start + len(chain)]
        start += len(chain)
        if chain:
            groups.append(ChainGroup(layout.tokens, layout.window_chunks, layout.raw_bytes, part))
    return groups


def _reach(groups: Sequence[ChainGroup[_There | _Link]], prefill: PrefillCost) -> int:
    decision = decide(groups, prefill)
    return decision.reach_tokens if decision is not None else 0


def _cost_s(
    groups: Sequence[ChainGroup[_There | _Link]], prefill: PrefillCost, num_tokens: int
) -> float:
    """To have the whole context there: what is worth loading loaded, the rest computed."""
    decision = decide(groups, prefill)
    if decision is None:
        return prefill.seconds(0, num_tokens)
    had_s = decision.load_s if decision.end_tokens else decision.recompute_s
    return had_s + prefill.seconds(decision.reach_tokens, num_tokens)
