"""What a cache answers to an offer."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Admission(Generic[Key]):
    """What came of an offer: which of the blocks to keep, and whose bytes to drop first.

    Attributes:
        kept: of the offered blocks, those that are held now (those held before included).
        evicted: blocks held before that left, children before parents.
    """

    kept: list[Key]
    evicted: list[Key]
