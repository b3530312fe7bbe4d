"""Chunks in memory, under a byte budget; the least recently used leave first.

A chunk arrives raw (a copy of the engine's bytes), becomes a frame when the encoder gets to it, and
is served in either form. The budget counts whichever form is held. Owned by the agent's event loop;
no locks. Chains are touched from their end, so a parent is always younger than its children and
leaves after them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcp_vllm.codec import ChunkLayout
from mcp_vllm.codec.loss import EXACT, rank
from mcp_vllm.session.manifest import DEFAULT_TENANT
from mcp_vllm.store.tenants import TenantLedger

# What an entry costs beyond its bytes (key, object, dictionary slot), counted against the budget.
ENTRY_OVERHEAD_BYTES = 512


class ChunkKey(NamedTuple):
    """A chunk's name: the engine's fingerprint digest, vLLM's offload key, and whose chunk it is.

    Equal keys of two tenants are two chunks: what one tenant has is nothing to another.
    """

    namespace: bytes
    key: bytes
    tenant: str = DEFAULT_TENANT


@dataclass(eq=False, slots=True)
class Chunk:
    """A stored chunk; exactly one of `raw` and `frame` is set.

    Attributes:
        layout: what the raw bytes are, for the codec.
        raw_bytes: size of the chunk as the engine holds it.
        raw: uint8, shape (raw_bytes,), read only, until encoded.
        frame: the encoded chunk.
        loss: what its content has been through, see `codec.loss`.
    """

    layout: ChunkLayout
    raw_bytes: int
    raw: NDArray[np.uint8] | None = None
    frame: bytes | None = None
    loss: str = EXACT

    @property
    def held_bytes(self) -> int:
        payload = len(self.frame) if self.frame is not None else self.raw_bytes
        return payload + ENTRY_OVERHEAD_BYTES


@dataclass(frozen=True)
class StoreSize:
    """Sizes of a store's contents, in bytes and chunks."""

    num_chunks: int
    held_bytes: int
    raw_held_bytes: int
    budget_bytes: int


@dataclass
class RamStore:
    """A bounded map from `ChunkKey` to `Chunk`.

    Invariant: the bytes held never exceed the budget. A chunk that does not fit beside the pinned
    ones, or into its tenant's quota, is not kept, which `put` reports; pinned chunks never leave by
    eviction. Each of `framed` is called with a chunk that has its frame now, and again when it is
    evicted: a tier below may take it. Each of `watchers` is called with a name and whether it has
    come (or gone), each of `over_quota` with the name of a chunk that left because its tenant had
    too much.
    """

    budget_bytes: int
    evictions: int = 0
    tenants: TenantLedger = field(default_factory=TenantLedger)
    over_quota: list[Callable[[ChunkKey], None]] = field(default_factory=list)
    watchers: list[Callable[[ChunkKey, bool], None]] = field(default_factory=list)
    framed: list[Callable[[ChunkKey, Chunk], None]] = field(default_factory=list)
    _chunks: OrderedDict[ChunkKey, Chunk] = field(default_factory=OrderedDict)
    _raw: dict[ChunkKey, None] = field(default_factory=dict)
    _pins: Counter[ChunkKey] = field(default_factory=Counter)
    _pinned_bytes: int = 0
    _held_bytes: int = 0
    _raw_held_bytes: int = 0

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, name: ChunkKey) -> bool:
        return name in self._chunks

    def __iter__(self) -> Iterator[ChunkKey]:
        return iter(self._chunks)

    def size(self) -> StoreSize:
        return StoreSize(
            len(self._chunks), self._held_bytes, self._raw_held_bytes, self.budget_bytes
        )

    def get(self, name: ChunkKey) -> Chunk | None:
        """The chunk, or None. Does not count as a use: see `touch`."""
        return self._chunks.get(name)

    def put(self, name: ChunkKey, chunk: Chunk) -> bool:
        """Keep `chunk`, evicting as needed; False when it cannot fit at all.

        A chunk that is present stays, unless the new one has lost less: otherwise equal names
        mean equal bytes.
        """
        present = self._chunks.get(name)
        if present is not None and rank(present.loss) <= rank(chunk.loss):
            self._used(name)
            return True
        if chunk.held_bytes > self.budget_bytes - self._pinned_bytes:
            return False
        replaced_bytes = present.held_bytes if present is not None else 0
        if not self._make_room_for(name, chunk.held_bytes - replaced_bytes):
            return False
        pins = self._pins.get(name, 0)
        if present is not None:
            self.discard(name)
        self._evict_until(self.budget_bytes - chunk.held_bytes)
        self._chunks[name] = chunk
        if pins:
            self._pins[name] = pins
            self._pinned_bytes += chunk.held_bytes
        self._account(name, chunk, 1)
        self.tenants.added(name, chunk.held_bytes)
        self._tell(name, True)
        self._tell_framed(name, chunk)
        return True

    def touch(self, names: Iterable[ChunkKey]) -> None:
        """Mark the chunks of one chain, in chain order, as just used."""
        for name in reversed(list(names)):
            if name in self._chunks:
                self._used(name)

    def set_frame(self, name: ChunkKey, chunk: Chunk, frame: bytes) -> None:
        """Replace the raw bytes of `chunk` by its frame; no effect if it has left meanwhile."""
        if self._chunks.get(name) is not chunk or chunk.frame is not None:
            return
        before = chunk.held_bytes
        self._account(name, chunk, -1)
        chunk.frame, chunk.raw = frame, None
        self._account(name, chunk, 1)
        self.tenants.resized(name, chunk.held_bytes - before)
        if name in self._pins:
            self._pinned_bytes += chunk.held_bytes - before
        self._tell_framed(name, chunk)
        # An incompressible chunk's frame exceeds its raw form by the frame header.
        self._make_room_for(name, 0)
        self._evict_until(self.budget_bytes)

    def discard(self, name: ChunkKey) -> None:
        """Forget the chunk, if present (its bytes proved bad)."""
        if name in self._pins:
            self._drop_pins(name)
        chunk = self._chunks.pop(name, None)
        if chunk is not None:
            self._account(name, chunk, -1)
            self.tenants.removed(name, chunk.held_bytes)
            self._tell(name, False)

    def pin(self, names: Iterable[ChunkKey], max_share: float) -> bool:
        """Keep these chunks (those that are here) until `unpin`; may be done several times.

        Nothing is pinned, and the answer is False, when pinned chunks would then hold more than
        that share of the budget.
        """
        wanted = [name for name in names if name in self._chunks]
        added = {name for name in wanted if name not in self._pins}
        added_bytes = sum(self._chunks[name].held_bytes for name in added)
        if self._pinned_bytes + added_bytes > max_share * self.budget_bytes:
            return False
        self._pins.update(wanted)
        self._pinned_bytes += added_bytes
        return True

    def unpin(self, names: Iterable[ChunkKey]) -> None:
        """Take one pin from each of these chunks; no effect on those that are not pinned."""
        for name in names:
            if name in self._pins:
                self._pins[name] -= 1
                if not self._pins[name]:
                    self._drop_pins(name)

    def next_raw(self) -> tuple[ChunkKey, Chunk] | None:
        """The chunk that has waited longest to be encoded, or None."""
        for name in self._raw:
            return name, self._chunks[name]
        return None

    def check_integrity(self) -> None:
        """Recount everything; for tests.

        Raises:
            AssertionError: the accounts and the contents differ.
        """
        raw = [name for name, chunk in self._chunks.items() if chunk.frame is None]
        assert set(raw) == set(self._raw)
        assert all((c.raw is None) != (c.frame is None) for c in self._chunks.values())
        assert self._held_bytes == sum(c.held_bytes for c in self._chunks.values())
        assert self._raw_held_bytes == sum(self._chunks[name].held_bytes for name in raw)
        assert self._held_bytes <= self.budget_bytes
        assert self._pinned_bytes == sum(self._chunks[name].held_bytes for name in self._pins)
        assert all(count > 0 for count in self._pins.values())
        self.tenants.check_integrity({n: c.held_bytes for n, c in self._chunks.items()})

    def _used(self, name: ChunkKey) -> None:
        self._chunks.move_to_end(name)
        self.tenants.touched(name)

    def _make_room_for(self, name: ChunkKey, added_bytes: int) -> bool:
        """Whether the tenant may hold so much more; what it had too much has left then."""
        victims = self.tenants.victims(
            name.tenant, added_bytes, lambda held: held == name or held in self._pins
        )
        for victim in victims or ():
            self.discard(victim)
            self.evictions += 1
            for watcher in self.over_quota:
                watcher(victim)
        return victims is not None

    def _evict_until(self, limit_bytes: int) -> None:
        while self._held_bytes > limit_bytes:
            name = next(iter(self._chunks))
            if name in self._pins:
                if self._held_bytes <= self._pinned_bytes:
                    return
                self._chunks.move_to_end(name)
                continue
            chunk = self._chunks.pop(name)
            self._account(name, chunk, -1)
            self.tenants.removed(name, chunk.held_bytes)
            self.evictions += 1
            self._tell_framed(name, chunk)
            self._tell(name, False)

    def _drop_pins(self, name: ChunkKey) -> None:
        del self._pins[name]
        self._pinned_bytes -= self._chunks[name].held_bytes

    def _tell(self, name: ChunkKey, present: bool) -> None:
        for watcher in self.watchers:
            watcher(name, present)

    def _tell_framed(self, name: ChunkKey, chunk: Chunk) -> None:
        if chunk.frame is not None:
            for watcher in self.framed:
                watcher(name, chunk)

    def _account(self, name: ChunkKey, chunk: Chunk, sign: int) -> None:
        self._held_bytes += sign * chunk.held_bytes
        if chunk.frame is None:
            self._raw_held_bytes += sign * chunk.held_bytes
            if sign > 0:
                self._raw[name] = None
            else:
                del self._raw[name]
