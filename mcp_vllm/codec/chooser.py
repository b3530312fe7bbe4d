"""Which codec brings a transfer over soonest: a model of its time, and a choice that does not flap.

A transfer of chunks passes three stages that overlap chunk by chunk: the sender encodes, the link
carries, the receiver decodes. The slowest stage sets the pace, the others cost one chunk each::

    time = L + (encode + wire + decode of one chunk) + (n - 1) * max(encode, wire, decode)

With one chunk this is the unpipelined sum S*R/B + L + encode + decode, with many it tends to
L + S / min(encode rate, B/R, decode rate).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

# Another codec must promise this much less time before it replaces the present one.
SWITCH_GAIN = 0.15
_LOWEST_BYTES_S = 1e3
_HIGHEST_BYTES_S = 1e12


@dataclass(frozen=True)
class CodecCost:
    """What a codec costs and saves. Rates are raw bytes a second, of all threads that may be used.

    Attributes:
        ratio: raw size over encoded size.
        encode_bytes_s: math.inf where the sender holds the frames already.
    """

    ratio: float
    encode_bytes_s: float
    decode_bytes_s: float

    def seconds(self, raw_bytes: int, num_chunks: int, link: Link) -> float:
        """Time from the request to the last decoded byte (see the module's docstring)."""
        per_chunk = raw_bytes / num_chunks
        stages = (
            per_chunk / self.encode_bytes_s,
            per_chunk / self.ratio / link.bytes_s,
            per_chunk / self.decode_bytes_s,
        )
        return link.latency_s + sum(stages) + (num_chunks - 1) * max(stages)


@dataclass(frozen=True)
class Link:
    """A link as measured: payload bytes a second, and seconds until the first byte comes."""

    bytes_s: float
    latency_s: float


class CodecChooser:
    """Chooses for one link, and stays with its choice unless another is clearly better."""

    def __init__(self) -> None:
        self.current: str | None = None

    def choose(
        self, costs: Mapping[str, CodecCost], raw_bytes: int, num_chunks: int, link: Link
    ) -> str:
        """The codec, of those in `costs` (at least one), for a transfer of that size."""
        seconds = {name: cost.seconds(raw_bytes, num_chunks, link) for name, cost in costs.items()}
        best = min(seconds, key=lambda name: seconds[name])
        present = seconds.get(self.current) if self.current is not None else None
        if present is None or seconds[best] < (1 - SWITCH_GAIN) * present:
            self.current = best
        assert self.current is not None
        return self.current


@dataclass(frozen=True)
class BreakEven:
    """Below `bytes_s` codec `below` is faster, above it codec `above`."""

    bytes_s: float
    below: str
    above: str


def break_evens(
    costs: Mapping[str, CodecCost], raw_bytes: int, num_chunks: int, latency_s: float
) -> Sequence[BreakEven]:
    """The bandwidths at which the best codec changes, rising; nothing when one is always best.

    Found by bisection on the logarithm of the bandwidth, to 0.1 %.
    """

    def best(log_bytes_s: float) -> str:
        link = Link(math.exp(log_bytes_s), latency_s)
        return min(costs, key=lambda name: costs[name].seconds(raw_bytes, num_chunks, link))

    low, high = math.log(_LOWEST_BYTES_S), math.log(_HIGHEST_BYTES_S)
    found: list[BreakEven] = []
    # Each codec is best on at most a few intervals: walk in steps, bisect where the best changes.
    num_steps = 400
    points = [low + (high - low) * step / num_steps for step in range(num_steps + 1)]
    for left, right in pairwise(points):
        below, above = best(left), best(right)
        if below == above:
            continue
        while right - left > 1e-3:
            middle = (left + right) / 2
            if best(middle) == below:
                left = middle
            else:
                right = middle
        found.append(BreakEven(math.exp(right), below, above))
    return found
