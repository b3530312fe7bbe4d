"""What an operator wants to know of the peers: `GET /v1/peers`, shown by `mcp-vllm peers`."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.peer import Peer


class BreakEvenReport(msgspec.Struct):
    """Below `mb_s` (10^6 bytes a second) codec `below` brings blocks sooner, above it `above`."""

    mb_s: float
    below: str
    above: str


class PeerReport(msgspec.Struct):
    """One peer, as seen from here.

    Attributes:
        up: whether it is being asked; it is avoided for a while after failures.
        latency_ms: from a request to its first byte; None until something was fetched.
        mb_s: 10^6 bytes a second while frames arrive; None until something was fetched.
        codec: asked for last; empty where the peer chose.
        break_evens: rising; empty where one codec is best on any link, or speeds are not known yet.
    """

    name: str
    up: bool
    latency_ms: float | None
    mb_s: float | None
    codec: str
    break_evens: list[BreakEvenReport]


class PeersReport(msgspec.Struct):
    peers: list[PeerReport]


def report(peers: Iterable[Peer], context: AgentContext) -> PeersReport:
    return PeersReport([_report_one(peer, context) for peer in peers])


def _report_one(peer: Peer, context: AgentContext) -> PeerReport:
    plan, codecs = peer.plan, context.codecs
    accepted = codecs.acceptable(context.config.codec.lossy)
    namespace = next(reversed(context.fingerprints), b"")
    costs = plan.costs(accepted, codecs.speeds(namespace), context.codec_threads)
    link, measured = plan.meter.link, plan.meter.is_measured
    return PeerReport(
        name=peer.name,
        up=peer.breaker.is_closed,
        latency_ms=round(1e3 * link.latency_s, 3) if measured else None,
        mb_s=round(link.bytes_s / 1e6, 3) if measured else None,
        codec=plan.codec,
        break_evens=[
            BreakEvenReport(round(each.bytes_s / 1e6, 1), each.below, each.above)
            for each in plan.break_evens(costs)
        ],
    )
