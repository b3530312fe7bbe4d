"""What the link tells the tier."""

from __future__ import annotations

from dataclasses import dataclass

from mcp_vllm.link import protocol


@dataclass(frozen=True)
class Found:
    """Answer to a lookup: one flag for each of its keys."""

    lookup_id: int
    present: bytes


@dataclass(frozen=True)
class JobDone:
    """A load or a store has ended.

    Attributes:
        failed: indices of the keys that did not arrive; a store fails as a whole (all or none).
        causes: why, one short word each.
        losses: what went through a lossy tier: (index of the key, name of the tier).
    """

    job_id: int
    failed: frozenset[int]
    raw_bytes: int = 0
    wire_bytes: int = 0
    sources: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    losses: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Lost:
    """The agent is gone, and with it what its store had."""


Event = Found | JobDone | protocol.Inventory | Lost
