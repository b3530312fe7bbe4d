"""A large set of chunk keys in nine bytes each: what an agent announces, and what it is told.

Keys are kept as 64-bit hashes. Two keys with one hash make one of them seem present where it is
not (for a million keys, once in 10^13 lookups): then a fetch leaves it out, the next holder is
tried and the chunk is recomputed. A wrong byte is impossible: frames name their whole key.

Sorted arrays hold most, a small dictionary the latest changes; the arrays are replaced and never
written, so a snapshot of them costs nothing. Owned by the agent's event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from mcp_vllm.session.manifest import DEFAULT_TENANT

Hashes = NDArray[np.uint64]
Ranks = NDArray[np.uint8]

HASH_BYTES = 8
# In the place of a rank: not in the set.
ABSENT = 0xFF
_ABSENT = np.uint8(ABSENT)
# The latest changes go into the arrays when there are so many: half a millisecond for 100,000 keys.
MERGE_AT = 4096
# What one of them costs in memory, in entries of the arrays.
CHANGE_WEIGHT = 8


def hash_keys(keys: Sequence[bytes], tenant: str = DEFAULT_TENANT) -> Hashes:
    """The hashes of that tenant's chunks: uint64, shape (len(keys),)."""
    whose = tenant.encode() + b"\0"
    hashes = (xxhash.xxh3_64_intdigest(whose + key) for key in keys)
    return np.fromiter(hashes, dtype=np.uint64, count=len(keys))


def hash_as(tenants: Sequence[str], keys: Sequence[bytes]) -> list[Hashes]:
    """The hashes of each tenant's chunks of these keys."""
    return [hash_keys(keys, tenant) for tenant in tenants]


class Snapshot(NamedTuple):
    """Hashes in rising order, and the rank of each: both of shape (n,), read only."""

    hashes: Hashes
    ranks: Ranks


class ChunkSet:
    """Hashes, each with a rank: a number below ABSENT that says what kind of chunk it is."""

    def __init__(self) -> None:
        self._hashes: Hashes = np.empty(0, dtype=np.uint64)
        self._ranks: Ranks = np.empty(0, dtype=np.uint8)
        self._changes: dict[int, int] = {}

    @property
    def weight(self) -> int:
        """An upper bound of the entries, with what is not merged yet at its price in memory."""
        return len(self._hashes) + CHANGE_WEIGHT * len(self._changes)

    def add(self, hashes: Hashes, rank: int) -> None:
        """Put these in, with that rank, whatever was known of them."""
        self._change(hashes, rank)

    def remove(self, hashes: Hashes) -> None:
        self._change(hashes, ABSENT)

    def ranks_of(self, hashes: Hashes) -> Ranks:
        """The rank of each; ABSENT for what is not in the set."""
        if len(self._hashes):
            places = self._hashes.searchsorted(hashes)
            there = self._hashes.take(places, mode="clip") == hashes
            found = np.where(there, self._ranks.take(places, mode="clip"), _ABSENT)
        else:
            found = np.full(len(hashes), ABSENT, dtype=np.uint8)
        if self._changes:
            for index, each in enumerate(hashes.tolist()):
                changed = self._changes.get(each)
                if changed is not None:
                    found[index] = changed
        return found

    def is_empty(self) -> bool:
        self._merge()
        return not len(self._hashes)

    def snapshot(self) -> Snapshot:
        """All of it as it is now; later changes do not touch the arrays."""
        self._merge()
        return Snapshot(self._hashes, self._ranks)

    def _change(self, hashes: Hashes, rank: int) -> None:
        self._changes.update(dict.fromkeys(hashes.tolist(), rank))
        if len(self._changes) >= MERGE_AT:
            self._merge()

    def _merge(self) -> None:
        if not self._changes:
            return
        count = len(self._changes)
        changed = np.fromiter(self._changes, dtype=np.uint64, count=count)
        ranks = np.fromiter(self._changes.values(), dtype=np.uint8, count=count)
        order = np.argsort(changed)
        changed, ranks = changed[order], ranks[order]
        stays = np.ones(len(self._hashes), dtype=bool)
        if len(self._hashes):
            places = np.minimum(np.searchsorted(self._hashes, changed), len(self._hashes) - 1)
            stays[places[self._hashes[places] == changed]] = False
        hashes, old_ranks = self._hashes[stays], self._ranks[stays]
        changed, ranks = changed[ranks != ABSENT], ranks[ranks != ABSENT]
        places = np.searchsorted(hashes, changed)
        self._hashes = np.insert(hashes, places, changed)
        self._ranks = np.insert(old_ranks, places, ranks)
        self._changes = {}
