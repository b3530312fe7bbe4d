"""The bandwidth and latency of the way to one peer, measured on the transfers themselves."""

from __future__ import annotations

import math
import time

from mcp_vllm.codec.chooser import Link

# Half a second of transfer at another speed has moved the estimate nearly all the way.
MEMORY_S = 0.15
LATENCY_WEIGHT = 0.3
# Until something was measured: a gigabit, a millisecond.
ASSUMED = Link(bytes_s=125e6, latency_s=0.001)
MAX_BYTES_S = 1e11
# A measurement that old does not say that a link is slow: it may have been mended.
STALE_S = 60.0
LUMP_BYTES = 64 << 10
# What a measurement needs before a load is given up because of it.
SURE_S, SURE_BYTES = 0.05, 1 << 20


class LinkMeter:
    """One per peer. Only time spent waiting for bytes counts, not the sender's encoding.

    Attributes:
        last_s: when bytes last came, on the monotonic clock; 0: never.
    """

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0
        self._latency_s: float | None = None
        self.last_s = 0.0

    def note_payload(self, num_bytes: int, seconds: float) -> None:
        """So many bytes of a frame came within that time."""
        keep = 0.0 if self._is_stale else math.exp(-seconds / MEMORY_S)
        self._bytes = self._bytes * keep + num_bytes
        self._seconds = self._seconds * keep + seconds
        if num_bytes:
            self.last_s = time.monotonic()

    def note_silence(self, seconds: float) -> None:
        """A wait for bytes was ended that long after it began. It says something of the link only
        if a packetful should have come meanwhile: bytes come in lumps."""
        if self.is_measured and seconds * self.link.bytes_s > LUMP_BYTES:
            self.note_payload(0, seconds)

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
    def is_sure(self) -> bool:
        """Whether it was measured lately, and on more than a few packets."""
        evidence = self._seconds >= SURE_S or self._bytes >= SURE_BYTES
        return evidence and not self._is_stale

    @property
    def expected(self) -> Link:
        """What to expect of the next transfer: as measured, or the better of an old measurement
        and the assumption."""
        link = self.link
        if not self._is_stale:
            return link
        return Link(max(link.bytes_s, ASSUMED.bytes_s), min(link.latency_s, ASSUMED.latency_s))

    @property
    def _is_stale(self) -> bool:
        return self.is_measured and time.monotonic() - self.last_s > STALE_S

    @property
    def link(self) -> Link:
        latency_s = ASSUMED.latency_s if self._latency_s is None else self._latency_s
        if not self.is_measured:
            return Link(ASSUMED.bytes_s, latency_s)
        return Link(min(MAX_BYTES_S, self._bytes / max(self._seconds, 1e-9)), latency_s)
