"""The structures in which an agent explains its cache (docs/api.md), shared with its clients."""

from __future__ import annotations

import msgspec


class TierView(msgspec.Struct):
    """What one tier's policy thinks of a block; the explanation's words are those of
    docs/smart-cache.md.

    Attributes:
        held: whether it is there; else it was, or was asked for, and is remembered.
        score: expected milliseconds of prefill saved a byte and second; the lowest leaves first.
        threshold: the score of the block that left last, 0 if none ever did.
        age_s: since its last use.
        hazard: the chance that a block of its uses is used before it leaves its age bin.
        levels: what is known of it at its last use; of a block that many requests share, only
            the uses.
        factors: how much likelier than others of its uses each table says it is to come back now;
            there are none for a block that many requests share.
    """

    held: bool
    pinned: bool
    score: float
    threshold: float
    age_s: float
    uses: int
    turn: int
    size_bytes: int
    saved_ms: float
    hazard: float
    levels: dict[str, int]
    factors: dict[str, float]


class BlockView(msgspec.Struct):
    """A block, by its key in hexadecimal. `memory`, `disk`: None where nothing is known of it."""

    namespace: str
    key: str
    tenant: str
    memory: TierView | None
    disk: TierView | None


class CacheView(msgspec.Struct):
    """`num_more` blocks were left out."""

    blocks: list[BlockView]
    num_more: int = 0
