"""Which engine a gateway should give a request to: `rank`, a pure function of what an agent says.

    from mcp_vllm import MCPClient
    from mcp_vllm.routing import rank

    agents = {"http://a:8000": "10.0.0.1:7077", "http://b:8000": "10.0.0.2:7077"}  # engine: agent
    with MCPClient("http://10.0.0.1:7077", tenant="acme") as client:
        placements = client.placements("chat-1")
    best = rank(placements, agents, asked="10.0.0.1:7077", waiting_s={"http://a:8000": 0.4})[0]
    send_to(best.engine)

One agent answers for all, from what the others announce, so a gateway asks the nearest one. For a
session that no agent has, which is answered with 404, the gateway decides as it would without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mcp_vllm.session.api import Placement


@dataclass(frozen=True)
class Ranked:
    """An engine for a request.

    Attributes:
        held_tokens: of the context, there already.
        cost_s: seconds until the context is there, by loading or computing, and until the engine
            gets to it.
    """

    engine: str
    held_tokens: int
    cost_s: float


def rank(
    placements: Sequence[Placement],
    agents: Mapping[str, str],
    *,
    asked: str,
    waiting_s: Mapping[str, float] | None = None,
) -> list[Ranked]:
    """The engines, the one that has the first token soonest in front.

    Args:
        placements: what the agent at `asked` said of the context; empty: nobody has any of it.
        agents: of each engine, its agent's "HOST:PORT" as the others' configuration has it.
        waiting_s: of each engine, how long a request waits before its turn, as the gateway knows or
            guesses; 0 where it is missing.
    """
    by_agent = {each.agent or asked: each for each in placements}
    # Who is not mentioned is a peer that is down, or none: it would have to compute everything.
    at_worst_s = max((each.recompute_s for each in placements), default=0.0)
    ranked = []
    for engine, agent in agents.items():
        place = by_agent.get(agent)
        cost_s = at_worst_s if place is None else place.cost_s
        held = 0 if place is None else place.held_tokens
        ranked.append(Ranked(engine, held, cost_s + (waiting_s or {}).get(engine, 0.0)))
    return sorted(ranked, key=lambda each: (each.cost_s, -each.held_tokens))
