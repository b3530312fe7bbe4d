"""What decides which chunks a tier keeps: the interface, and least recently used behind it.

A policy knows names and sizes, never bytes. Whoever owns the bytes calls it, from one thread, and
drops what it names. The interface is the part of `SmartCache` that a tier needs.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

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


class CachePolicy(Protocol[Key]):
    """Invariant: what is held takes at most `budget_bytes`; a block leaves after its children."""

    @property
    def budget_bytes(self) -> int: ...

    @property
    def held_bytes(self) -> int: ...

    def __contains__(self, key: Key) -> bool: ...

    def access(self, chain: Sequence[Key]) -> int:
        """A request used this chain, root first; how many leading blocks are held."""
        ...

    def offer(
        self, blocks: Sequence[Key], sizes_bytes: Sequence[int], *, tenant: str = ""
    ) -> Admission[Key]:
        """Blocks of one chain, root first, could be held."""
        ...

    def remove(self, key: Key) -> None:
        """It is not held any more, whatever the policy thinks of that."""
        ...


class LruPolicy(Generic[Key]):
    """Least recently used leaves first; a block never before the children that are held."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._sizes: OrderedDict[Key, int] = OrderedDict()
        self._held_bytes = 0
        # Of held blocks, as far as a chain has told; and how many held children a parent has.
        self._parents: dict[Key, Key] = {}
        self._children: Counter[Key] = Counter()

    @property
    def budget_bytes(self) -> int:
        return self._budget_bytes

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def __contains__(self, key: Key) -> bool:
        return key in self._sizes

    def access(self, chain: Sequence[Key]) -> int:
        """See `CachePolicy`. The root becomes the youngest."""
        parent: Key | None = None
        for key in chain:
            self._learn_parent(key, parent)
            parent = key
        for key in reversed(chain):
            if key in self._sizes:
                self._sizes.move_to_end(key)
        for count, key in enumerate(chain):
            if key not in self._sizes:
                return count
        return len(chain)

    def offer(
        self, blocks: Sequence[Key], sizes_bytes: Sequence[int], *, tenant: str = ""
    ) -> Admission[Key]:
        """See `CachePolicy`: all that fit into the budget are kept."""
        evicted: list[Key] = []
        for key, size_bytes in zip(reversed(blocks), reversed(sizes_bytes), strict=True):
            if key in self._sizes:
                self._sizes.move_to_end(key)
            elif size_bytes <= self._budget_bytes:
                while self._held_bytes + size_bytes > self._budget_bytes:
                    evicted.append(self._evict())
                self._sizes[key] = size_bytes
                self._held_bytes += size_bytes
        self.access(blocks)
        gone, new = set(evicted), set(blocks)
        return Admission(
            [key for key in blocks if key in self._sizes],
            [key for key in evicted if key in gone - new],
        )

    def remove(self, key: Key) -> None:
        """See `CachePolicy`."""
        size_bytes = self._sizes.pop(key, None)
        if size_bytes is not None:
            self._held_bytes -= size_bytes
            parent = self._parents.pop(key, None)
            if parent is not None:
                self._children[parent] -= 1
                if not self._children[parent]:
                    del self._children[parent]

    def _learn_parent(self, key: Key, parent: Key | None) -> None:
        if parent is not None and key in self._sizes and key not in self._parents:
            self._parents[key] = parent
            self._children[parent] += 1

    def _evict(self) -> Key:
        """The oldest without held children leaves; the parents before it are used, as they are."""
        while True:
            key = next(iter(self._sizes))
            if key not in self._children:
                self.remove(key)
                return key
            self._sizes.move_to_end(key)
