"""Which peer brings what of a load: every chunk from its nearest holder, the front of the chain
first. Pure functions; `peers` puts holders in order, `load` sends for chunks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from mcp_vllm.agent.peer import Peer


class Errand(NamedTuple):
    """One peer's part: positions of chunks, in the order in which they are missing."""

    peer: Peer
    wanted: list[int]


def nearest_first(holders: Mapping[bytes, list[Peer]], raw_bytes: int) -> None:
    """Put each chunk's holders in order, for a transfer of about that size."""
    peers = {peer for those in holders.values() for peer in those}
    if len(peers) < 2:
        return
    # Names decide between equals, so that the whole of a load goes to one of them.
    place = {peer: (distance_s(peer, raw_bytes), peer.name) for peer in peers}
    for those in holders.values():
        those.sort(key=place.__getitem__)


def distance_s(peer: Peer, raw_bytes: int) -> float:
    """Seconds for so many bytes over its link, as measured or assumed."""
    link = peer.plan.meter.link
    return link.latency_s + raw_bytes / link.bytes_s


def next_errand(
    missing: Sequence[int],
    holders_of: Callable[[int], Sequence[Peer]],
    tried: Collection[Peer],
) -> Errand | None:
    """Who goes next; None when nobody is left who has any of `missing`.

    It is the nearest holder of the first chunk that anybody has, and it brings all chunks that
    nobody nearer has. Peers that are down, or were tried, do not count.

    Args:
        missing: the front of the chain first.
        holders_of: the nearest first.
    """
    nearest: dict[int, Peer] = {}
    for index in missing:
        able = (peer for peer in holders_of(index) if peer not in tried and not peer.is_down)
        peer = next(able, None)
        if peer is not None:
            nearest[index] = peer
    if not nearest:
        return None
    first = next(iter(nearest.values()))
    return Errand(first, [index for index, peer in nearest.items() if peer is first])
