"""The namespace of exchangeable blocks: everything that must agree before bytes may change hands.

An engine describes itself as a flat, ordered mapping of field names to strings. Two engines
exchange blocks only when every field agrees; the digest of the mapping is the namespace under which
an agent stores blocks. When two differ, `first_difference` names the field, so that the log can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import msgspec
from blake3 import blake3

DIGEST_BYTES = 16
MAX_FIELDS = 64
MAX_VALUE_CHARS = 4096


@dataclass(frozen=True)
class FieldDifference:
    """The first field in which two fingerprints differ; a missing field reads as ``"(absent)"``."""

    field: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.field}: ours is {self.ours!r}, theirs is {self.theirs!r}"


@dataclass(frozen=True)
class Fingerprint:
    """What an engine's KV bytes depend on.

    `fields` keeps the order in which differences are looked for: put what a person would check
    first (the model) in front. Neither names nor values are secrets; they travel in hello messages.
    """

    fields: Mapping[str, str]

    @cached_property
    def digest(self) -> bytes:
        """16 bytes, independent of the order of the fields."""
        canonical = msgspec.msgpack.encode(sorted(self.fields.items()))
        return blake3(canonical).digest(length=DIGEST_BYTES)

    def first_difference(self, other: Fingerprint) -> FieldDifference | None:
        """The first differing field, in our order and then theirs; None when they agree."""
        names = [*self.fields, *(name for name in other.fields if name not in self.fields)]
        for name in names:
            ours, theirs = self.fields.get(name), other.fields.get(name)
            if ours != theirs:
                return FieldDifference(name, _shown(ours), _shown(theirs))
        return None

    def closest(self, others: list[Fingerprint]) -> Fingerprint | None:
        """Of `others`, the one that shares most fields with us, and of equals the one whose first
        difference comes last; None when there is none."""
        return max(others, key=self._likeness, default=None)

    def _likeness(self, other: Fingerprint) -> tuple[int, int]:
        shared = [other.fields.get(name) == value for name, value in self.fields.items()]
        first_difference = shared.index(False) if False in shared else len(shared)
        return sum(shared), first_difference


def _shown(value: str | None) -> str:
    return "(absent)" if value is None else value
