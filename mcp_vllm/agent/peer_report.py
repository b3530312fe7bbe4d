"""What an operator wants to know of the peers: `GET /v1/peers`, shown by `mcp-vllm peers`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.load_record import LoadRecord
from mcp_vllm.agent.peer import Peer
from mcp_vllm.codec.speeds import Speed


class BreakEvenReport(msgspec.Struct):
    """Below `mb_s` (10^6 bytes a second) codec `below` brings blocks sooner, above it `above`."""

    mb_s: float
    below: str
    above: str


class LoadsReport(msgspec.Struct):
    """What became of the contexts that could be loaded from one place.

    Attributes:
        loaded, partial, recomputed: how often each was chosen.
        given_up: loads that were ended because computing was quicker.
        predicted_actual: predicted over actual duration, the median of the latest loads from there
            alone; None before the first.
        saved_s: against computing, as measured; negative when the loads lost.
    """

    loaded: int
    partial: int
    recomputed: int
    given_up: int
    predicted_actual: float | None
    saved_s: float


class PeerReport(msgspec.Struct):
    """One peer, as seen from here.

    Attributes:
        up: whether it is being asked; it is avoided for a while after failures.
        directory: what is known of what it has (`peer.Following`).
        chunks: of it, as far as its directory is known.
        latency_ms: the round trip; None until it was measured.
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
    loads: LoadsReport
    directory: str = ""
    chunks: int = 0


class CodecReport(msgspec.Struct):
    """A codec as measured on this machine: 10^6 raw bytes a second of one thread, and the ratio on
    synthetic KV."""

    name: str
    encode_mb_s: float
    decode_mb_s: float
    ratio: float


class PeersReport(msgspec.Struct):
    """The peers, and the codecs that this agent can use for its latest engine.

    Attributes:
        store: loads from this agent's own store.
        prefill_tokens_s: of a prompt of 4,096 tokens by the latest engine, as it measured; None
            before that.
    """

    peers: list[PeerReport]
    codecs: list[CodecReport]
    store: LoadsReport
    prefill_tokens_s: float | None = None


def report(peers: Iterable[Peer], context: AgentContext) -> PeersReport:
    namespace = next(reversed(context.fingerprints), b"")
    speeds = context.codecs.speeds(namespace)
    codecs = [
        CodecReport(
            name,
            round(speed.encode_bytes_s / 1e6, 1),
            round(speed.decode_bytes_s / 1e6, 1),
            round(speed.ratio, 2),
        )
        for name, speed in speeds.items()
    ]
    prefill = context.prefills.get(namespace)
    return PeersReport(
        [_report_one(peer, context, speeds) for peer in peers],
        codecs,
        _report_loads(context.store_record),
        round(prefill.tokens_s, 1) if prefill else None,
    )


def _report_loads(record: LoadRecord) -> LoadsReport:
    accuracy = record.accuracy
    return LoadsReport(
        loaded=record.choices["load"],
        partial=record.choices["partial"],
        recomputed=record.choices["recompute"],
        given_up=record.given_up,
        predicted_actual=None if accuracy is None else round(accuracy, 3),
        saved_s=round(record.saved_s, 3),
    )


def _report_one(peer: Peer, context: AgentContext, speeds: Mapping[str, Speed]) -> PeerReport:
    plan = peer.plan
    accepted = context.codecs.acceptable(context.config.codec.lossy)
    costs = plan.costs(accepted, speeds, context.codec_threads)
    link, measured = plan.meter.link, plan.meter.is_measured
    return PeerReport(
        name=peer.name,
        up=peer.breaker.is_closed,
        latency_ms=round(1e3 * link.latency_s, 3) if plan.meter.knows_latency else None,
        mb_s=round(link.bytes_s / 1e6, 3) if measured else None,
        codec=plan.codec,
        break_evens=[
            BreakEvenReport(round(each.bytes_s / 1e6, 1), each.below, each.above)
            for each in plan.break_evens(costs)
        ],
        directory=peer.following,
        chunks=peer.directory.num_chunks,
        loads=_report_loads(plan.record),
    )
