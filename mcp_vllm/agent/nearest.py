"""Which peer brings what of a load: every chunk from its nearest holder, the front of the chain
first. Pure functions over what `load` knows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from mcp_vllm.agent.peer import Peer


class Errand(NamedTuple):
    """One peer's part: positions of chunks, rising."""

    peer: Peer
    wanted: list[int]


def next_errand(
    missing: Collection[int],
    holders_of: Callable[[int], Sequence[Peer]],
    sizes: Callable[[int], int],
    tried: Collection[Peer],
) -> Errand | None:
    """Who goes next; None when nobody is left who has any of `missing`.

    It is the nearest holder of the first chunk that anybody has, and it brings all chunks that
    nobody nearer has. Peers that are down, or were tried, do not count.
    """
    candidates: dict[int, list[Peer]] = {}
    for index in sorted(missing):
        able = [peer for peer in holders_of(index) if peer not in tried and not peer.is_down]
        if able:
            candidates[index] = able
    if not candidates:
        return None
    raw_bytes = sum(map(sizes, candidates))
    peers = {peer for able in candidates.values() for peer in able}
    # Names decide between equals, so that the whole of a load goes to one of them.
    distance = {peer: (distance_s(peer, raw_bytes), peer.name) for peer in peers}
    nearest = {index: min(able, key=distance.__getitem__) for index, able in candidates.items()}
    first = nearest[next(iter(nearest))]
    return Errand(first, [index for index, peer in nearest.items() if peer is first])


def distance_s(peer: Peer, raw_bytes: int) -> float:
    """Seconds for so many bytes over its link, as measured or assumed."""
    link = peer.plan.meter.link
    return link.latency_s + raw_bytes / link.bytes_s
