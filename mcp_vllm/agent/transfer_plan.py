"""How to ask one peer for chunks: in which codec, and how many in one request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from mcp_vllm.agent.link_meter import LinkMeter
from mcp_vllm.agent.load_record import LoadRecord
from mcp_vllm.codec.chooser import BreakEven, CodecChooser, CodecCost, break_evens
from mcp_vllm.codec.speeds import Speed
from mcp_vllm.link.prefill import PrefillCost

# A request brings what the link carries in this time: the codec follows a link that changes.
REQUEST_S = 0.3
# ... and this much before the link was measured.
FIRST_REQUEST_BYTES = 4 << 20
RATIO_WEIGHT = 0.2
# What the break-even bandwidths are told for: a context of middling size.
TYPICAL_BYTES, TYPICAL_CHUNKS = 64 << 20, 256
HIGHEST_BYTES_S = 1e12
# What frames are taken for while the sender has not said how it codes.
UNKNOWN_CODEC = CodecCost(ratio=1.4, encode_bytes_s=math.inf, decode_bytes_s=300e6)
MAX_PREFILLS = 64


class TransferPlan:
    """One per peer.

    Attributes:
        meter: of the link, fed by the transfers.
        codec: what was chosen last; empty while the holder chooses.
        record: of the loads from it.
    """

    def __init__(self) -> None:
        self.meter = LinkMeter()
        self.record = LoadRecord()
        self._chooser = CodecChooser()
        self._stored_codec = ""
        self._send_bytes_s: dict[str, float] = {}
        self._ratios: dict[str, float] = {}
        self._prefills: dict[bytes, PrefillCost] = {}

    @property
    def codec(self) -> str:
        return self._chooser.current or ""

    def learn_sender(self, stored_codec: str, send_bytes_s: Mapping[str, float]) -> None:
        """What the peer said about itself; values that make no sense are left out."""
        self._stored_codec = stored_codec
        self._send_bytes_s = {
            name: rate for name, rate in send_bytes_s.items() if 0 < rate <= HIGHEST_BYTES_S
        }

    def learn_prefill(self, namespace: bytes, prefill: PrefillCost | None) -> None:
        """What computing costs an engine of that kind there, as the peer says."""
        if prefill is None or not prefill.is_sound:
            return
        self._prefills.pop(namespace, None)
        self._prefills[namespace] = prefill
        while len(self._prefills) > MAX_PREFILLS:
            del self._prefills[next(iter(self._prefills))]

    def prefill_of(self, namespace: bytes) -> PrefillCost | None:
        return self._prefills.get(namespace)

    def seconds(self, raw_bytes: int, num_chunks: int, costs: Mapping[str, CodecCost]) -> float:
        """How long a transfer of chunks of that size together takes, in the best of `costs`.

        It travels in requests of `REQUEST_S`, each of which waits for its first byte.
        """
        link = self.meter.expected
        candidates = costs.values() or (UNKNOWN_CODEC,)
        once_s = min(cost.seconds(raw_bytes, num_chunks, link) for cost in candidates)
        num_requests = max(1, math.ceil((once_s - link.latency_s) / REQUEST_S))
        return once_s + (min(num_requests, num_chunks) - 1) * link.latency_s

    def learn_ratio(self, codec: str, ratio: float) -> None:
        """A frame of that codec had this ratio of raw to encoded bytes."""
        known = self._ratios.setdefault(codec, ratio)
        self._ratios[codec] = known + RATIO_WEIGHT * (ratio - known)

    def next_request(
        self, sizes: Sequence[int], accepted: Iterable[str], speeds: Mapping[str, Speed], cores: int
    ) -> tuple[str, int]:
        """The codec to ask for, and how many of the chunks still wanted (`sizes`, raw bytes).

        `accepted` names the codecs to choose from, `speeds` this machine's, on `cores` threads. An
        empty codec leaves the choice to the holder: nothing is known yet.
        """
        costs = self.costs(accepted, speeds, cores)
        if not costs:
            return "", count_within(sizes, FIRST_REQUEST_BYTES)
        link = self.meter.link
        codec = self._chooser.choose(costs, sum(sizes), len(sizes), link)
        if not self.meter.is_measured:
            return codec, count_within(sizes, FIRST_REQUEST_BYTES)
        pace = min(link.bytes_s * costs[codec].ratio, costs[codec].decode_bytes_s)
        return codec, count_within(sizes, REQUEST_S * pace)

    def costs(
        self, accepted: Iterable[str], speeds: Mapping[str, Speed], cores: int
    ) -> dict[str, CodecCost]:
        """What each codec costs that both sides have."""
        costs = {}
        for name in accepted:
            speed = speeds.get(name)
            stored = name == self._stored_codec
            if speed is None or not (stored or name in self._send_bytes_s):
                continue
            encode_bytes_s = math.inf if stored else self._send_bytes_s[name]
            ratio = max(self._ratios.get(name, speed.ratio), 1e-3)
            costs[name] = CodecCost(ratio, encode_bytes_s, cores * speed.decode_bytes_s)
        return costs

    def break_evens(self, costs: Mapping[str, CodecCost]) -> Sequence[BreakEven]:
        """The bandwidths of this link at which another of `costs` becomes the best."""
        latency_s = self.meter.link.latency_s
        return break_evens(costs, TYPICAL_BYTES, TYPICAL_CHUNKS, latency_s) if costs else ()


def sending_speeds(stored_codec: str, speeds: Mapping[str, Speed], cores: int) -> dict[str, float]:
    """Codec -> raw bytes a second at which frames of `stored_codec` become frames of it."""
    decode_s = 1 / speeds[stored_codec].decode_bytes_s if stored_codec in speeds else 0.0
    return {
        name: cores / (decode_s + 1 / speed.encode_bytes_s)
        for name, speed in speeds.items()
        if name != stored_codec
    }


def count_within(sizes: Sequence[int], max_bytes: float) -> int:
    """How many of the first chunks have that size together; at least one."""
    total = 0
    for count, size in enumerate(sizes):
        total += size
        if total > max_bytes:
            return max(1, count)
    return len(sizes)
