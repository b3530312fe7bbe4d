"""Chunks in memory, under a byte budget; SmartCache says which leave.

A chunk arrives raw (a copy of the engine's bytes), becomes a frame when the encoder gets to it, and
is served in either form. The budget counts whichever form is held. Owned by the agent's event loop;
no locks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcp_vllm.codec import ChunkLayout
from mcp_vllm.codec.loss import EXACT, rank
from mcp_vllm.session.manifest import DEFAULT_TENANT
from mcp_vllm.store.chunk_policy import MAX_CHUNK_BYTES, ChunkPolicy
from mcp_vllm.store.newcomers import Newcomers
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


class RamStore:
    """A bounded map from `ChunkKey` to `Chunk`.

    Invariant: the bytes held never exceed the budget. A chunk that does not fit beside the pinned
    ones, or into its tenant's quota, is not kept, which `put` reports; pinned chunks never leave by
    eviction, and newcomers not before their request told its chain (`touch`), as far as others can
    leave instead.

    Attributes:
        policy: what decides; its budget is the store's.
        evictions: chunks that had to leave since the start.
        framed: each called with a chunk that has its frame now, and again when it is evicted: a
            tier below may take it.
        watchers: each called with a name and whether it has come (or gone).
        over_quota: each called with the name of a chunk that left because its tenant had too much.
    """

    def __init__(self, budget_bytes: int, policy: ChunkPolicy | None = None) -> None:
        self.budget_bytes = budget_bytes
        self.policy = ChunkPolicy(budget_bytes) if policy is None else policy
        assert self.policy.budget_bytes == budget_bytes
        self.evictions = 0
        self.tenants = TenantLedger()
        self.over_quota: list[Callable[[ChunkKey], None]] = []
        self.watchers: list[Callable[[ChunkKey, bool], None]] = []
        self.framed: list[Callable[[ChunkKey, Chunk], None]] = []
        self._chunks: dict[ChunkKey, Chunk] = {}
        self._newcomers = Newcomers(self.policy)
        self._raw: dict[ChunkKey, None] = {}
        self._pins: Counter[ChunkKey] = Counter()
        self._pinned_bytes = 0
        self._held_bytes = 0
        self._raw_held_bytes = 0

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
            return True
        if chunk.held_bytes > min(self.budget_bytes - self._pinned_bytes, MAX_CHUNK_BYTES):
            return False
        if present is not None:
            return self._replace(name, present, chunk)
        if not self._make_room(name, chunk.held_bytes, num_chunks=1):
            return False
        self.policy.hold(name, chunk.held_bytes)
        self._newcomers.add(name, chunk.held_bytes)
        self._add(name, chunk)
        return True

    def offer(self, name: ChunkKey, chunk: Chunk) -> bool:
        """Keep a chunk that a tier below has, if it is worth more than what had to leave for it."""
        if name in self._chunks:
            return True
        if chunk.held_bytes > MAX_CHUNK_BYTES:
            return False
        admission = self.policy.admit(name, chunk.held_bytes)
        for victim in admission.evicted:
            self._leave(victim)
        if name not in admission.kept:
            return False
        self._add(name, chunk)
        return True

    def touch(
        self,
        chain: Sequence[ChunkKey],
        *,
        num_output_tokens: int | None = None,
        since_s: float | None = None,
    ) -> None:
        """A request used this chain, root first; see `SmartCache.access`."""
        self.policy.access(chain, num_output_tokens=num_output_tokens, since_s=since_s)
        self._newcomers.settle(chain)

    def set_frame(self, name: ChunkKey, chunk: Chunk, frame: bytes) -> None:
        """Replace the raw bytes of `chunk` by its frame; no effect if it has left meanwhile."""
        if self._chunks.get(name) is not chunk or chunk.frame is not None:
            return
        framed = Chunk(chunk.layout, chunk.raw_bytes, frame=frame, loss=chunk.loss)
        # An incompressible chunk's frame exceeds its raw form by the frame header.
        if not self._fits(name, framed.held_bytes - chunk.held_bytes):
            self.discard(name)
            return
        before = chunk.held_bytes
        self._account(name, chunk, -1)
        chunk.frame, chunk.raw = frame, None
        self._account(name, chunk, 1)
        self.tenants.resized(name, chunk.held_bytes - before)
        if name in self._pins:
            self._pinned_bytes += chunk.held_bytes - before
        self._tell_framed(name, chunk)

    def discard(self, name: ChunkKey) -> None:
        """Forget the chunk, if present (its bytes proved bad)."""
        if name in self._chunks:
            if name in self._pins:
                self._drop_pins(name)
            self._newcomers.forget(name)
            self.policy.remove(name)
            self._remove(name)

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
        self.policy.pin(added)
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
        self.policy.check_integrity()
        assert (len(self.policy), self.policy.held_bytes) == (len(self), self._held_bytes)
        assert all(name in self.policy for name in self._chunks)

    def _replace(self, name: ChunkKey, present: Chunk, chunk: Chunk) -> bool:
        if not self._fits(name, chunk.held_bytes - present.held_bytes):
            return False
        pinned = name in self._pins
        if pinned:
            self._pinned_bytes += chunk.held_bytes - present.held_bytes
        self._remove(name)
        self._add(name, chunk)
        return True

    def _fits(self, name: ChunkKey, grown_bytes: int) -> bool:
        """Let a chunk that is here take so many more bytes; what had to leave for it has left."""
        if not self._make_room(name, grown_bytes, num_chunks=0):
            return False
        self.policy.resize(name, self._chunks[name].held_bytes + grown_bytes)
        return True

    def _make_room(self, name: ChunkKey, added_bytes: int, num_chunks: int) -> bool:
        return self._evict(name, added_bytes, num_chunks) or (
            self._newcomers.settle_all() and self._evict(name, added_bytes, num_chunks)
        )

    def _evict(self, name: ChunkKey, added_bytes: int, num_chunks: int) -> bool:
        """Whether the tenant, and all together, may hold so much more now."""
        surplus = self.policy.evict_over_quota(name, added_bytes)
        for victim in surplus or ():
            self._leave(victim)
            for watcher in self.over_quota:
                watcher(victim)
        if surplus is None:
            return False
        victims = self.policy.evict(added_bytes, num_chunks, protected=[name])
        for victim in victims or ():
            self._leave(victim)
        return victims is not None

    def _leave(self, victim: ChunkKey) -> None:
        """The policy has evicted it."""
        chunk = self._chunks[victim]
        self.evictions += 1
        self._newcomers.forget(victim)
        self._tell_framed(victim, chunk)
        self._remove(victim)

    def _add(self, name: ChunkKey, chunk: Chunk) -> None:
        self._chunks[name] = chunk
        self._account(name, chunk, 1)
        self.tenants.added(name, chunk.held_bytes)
        self._tell(name, True)
        self._tell_framed(name, chunk)

    def _remove(self, name: ChunkKey) -> None:
        chunk = self._chunks.pop(name)
        self._account(name, chunk, -1)
        self.tenants.removed(name, chunk.held_bytes)
        self._tell(name, False)

    def _drop_pins(self, name: ChunkKey) -> None:
        del self._pins[name]
        self._pinned_bytes -= self._chunks[name].held_bytes
        self.policy.unpin([name])

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
