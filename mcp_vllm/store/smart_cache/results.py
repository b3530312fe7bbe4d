"""What SmartCache is told and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class TurnEnd(IntEnum):
    """What ended a turn: a call of a tool comes back sooner than a user does."""

    UNKNOWN = 0
    USER = 1
    TOOL_CALL = 2


@dataclass(frozen=True)
class Explanation:
    """Why a block is kept, or was not.

    Attributes:
        score: expected saved milliseconds a byte and second; the lowest leaves first.
        threshold: the score of the block that was evicted last, 0 if none ever was.
        age_s: since its last use.
        hazard: the chance that a block of its uses is used before it leaves its age bin.
        levels: what is known of it at its last use, see `layout.LEVELS`; of a block that many
            requests share only the level of uses, up to 13.
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
