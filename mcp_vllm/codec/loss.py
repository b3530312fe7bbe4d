"""How far a chunk may be from what an engine computed.

A chunk's *loss* is EXACT or the name of the lossy tier that it, or any context it was computed
from, went through; of several the one that promises least. A chunk with a loss is only given to
those who accept that tier.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

EXACT = ""
# From the one that promises most to the one that promises least.
LOSSY_TIERS = ("near-lossless", "balanced", "small")

# How many tokens at the front of a context lossy codecs keep exact.
NUM_EXACT_TOKENS = 16

# By rank.
LOSSES = (EXACT, *LOSSY_TIERS)

_RANKS = {name: rank for rank, name in enumerate(LOSSES)}


def worst(losses: Iterable[str]) -> str:
    """The loss of what was made from parts of these losses; unknown names count as the worst."""
    return max(losses, key=rank, default=EXACT)


def rank(loss: str) -> int:
    """0 for EXACT, rising with what may be lost."""
    return _RANKS.get(loss, len(_RANKS))


def is_acceptable(loss: str, accepted: Collection[str]) -> bool:
    """Whether somebody who accepts these tiers may have a chunk of that loss."""
    return loss == EXACT or loss in accepted
