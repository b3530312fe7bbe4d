"""The bandwidth and latency of the way to one peer, measured on the transfers themselves."""

from __future__ import annotations

import math

from mcp_vllm.codec.chooser import Link

# Half a second of transfer at another speed has moved the estimate nearly all the way.
MEMORY_S = 0.15
LATENCY_WEIGHT = 0.3
# Until something was measured: a gigabit, a millisecond.
ASSUMED = Link(bytes_s=125e6, latency_s=0.001)
MAX_BYTES_S = 1e11


class LinkMeter:
    """One per peer. Only time spent waiting for bytes counts, not the sender's encoding."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0
        self._latency_s: float | None = None

    def note_payload(self, num_bytes: int, seconds: float) -> None:
        """So many bytes of a frame came within that time."""
        keep = math.exp(-seconds / MEMORY_S)
        self._bytes = self._bytes * keep + num_bytes
        self._seconds = self._seconds * keep + seconds

    def note_latency(self, seconds: float) -> None:
        """A small request was answered after that time."""
        if self._latency_s is None:
            self._latency_s = seconds
        else:
            self._latency_s += LATENCY_WEIGHT * (seconds - self._latency_s)

    @property
    def is_measured(self) -> bool:
        return self._bytes > 0

    @property
    def knows_latency(self) -> bool:
        return self._latency_s is not None

    @property
    def link(self) -> Link:
        latency_s = ASSUMED.latency_s if self._latency_s is None else self._latency_s
        if not self.is_measured:
            return Link(ASSUMED.bytes_s, latency_s)
        return Link(min(MAX_BYTES_S, self._bytes / max(self._seconds, 1e-9)), latency_s)
