"""SmartCache: which blocks to keep, by the prefill time they will save a byte and second.

One policy for three places: vLLM's primary tier, the agent's RAM store, the agent's disk store. It
knows names, sizes and times, never the bytes; whoever owns the bytes calls it, from one thread, and
drops what it names. Nothing here reads a clock but the one given, and equal calls decide equally.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from mcp_vllm.errors import McpError
from mcp_vllm.store.policy import Admission
from mcp_vllm.store.smart_cache import explanation, layout, saved
from mcp_vllm.store.smart_cache.admission import admit_chain, find_all, hold_block
from mcp_vllm.store.smart_cache.eviction import make_room, make_tenant_room
from mcp_vllm.store.smart_cache.layout import HELD, PROTECTED, State
from mcp_vllm.store.smart_cache.records import num_ghosts
from mcp_vllm.store.smart_cache.results import Explanation, TurnEnd
from mcp_vllm.store.smart_cache.tree import QUOTA, change_pins, release, resize
from mcp_vllm.store.smart_cache.use import use_chain

Key = TypeVar("Key", bound=Hashable)

# A ghost costs about 80 bytes. A small cache needs many for its size: it learns nothing from what
# it forgot before it came back.
MIN_GHOSTS = 3 << 12
MAX_TENANTS = 4096
_NO_TIME = float("inf")


def fingerprint(key: Hashable) -> int:
    """64 bits of a key: bytes, an integer, or a tuple of these. Equal in every process."""
    if isinstance(key, bytes):
        return xxhash.xxh3_64_intdigest(key)
    if isinstance(key, int):
        return xxhash.xxh3_64_intdigest(key.to_bytes(16, "little", signed=True))
    if isinstance(key, tuple):
        return xxhash.xxh3_64_intdigest(
            b"".join(fingerprint(part).to_bytes(8, "little") for part in key)
        )
    raise TypeError(f"a key of SmartCache is bytes, an integer or a tuple, not {type(key)}")


class SmartCache(Generic[Key]):
    """Decides which blocks stay within a budget of bytes and a number of blocks.

    The owner calls, in this order for a request:

    1. `access` with the whole chain of the prompt, root first: learns, and says how many leading
       blocks are held. Once a request, when its keys are known. At its end once more, with
       `since_s` (when the first call was made), the answer's blocks, and how it ended.
    2. `offer` for blocks that could be stored: the policy keeps those that pay, and names what to
       drop. Or, where the owner must store what it was given (vLLM's tier): `evict`, then `insert`.

    Invariants, after every call: held bytes <= `budget_bytes`, held blocks <= `max_blocks`, a
    tenant's bytes <= its quota; a pinned block was not evicted; a block left after all its held
    children did. (`remove`, which the owner calls for bytes that proved bad, may break the last.)

    Keys are chained: a block's key determines its parent.
    """

    def __init__(
        self,
        budget_bytes: int,
        max_blocks: int,
        *,
        max_ghosts: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        fingerprint: Callable[[Key], int] = fingerprint,
        seed: int = 1,
    ) -> None:
        if budget_bytes < 1 or max_blocks < 1:
            raise McpError(f"a cache of {budget_bytes} bytes, {max_blocks} blocks can hold nothing")
        ghosts = max_ghosts if max_ghosts is not None else max(MIN_GHOSTS, max_blocks)
        if ghosts < 1:
            raise McpError("a cache without ghosts learns nothing: max_ghosts must be at least 1")
        self.max_blocks = max_blocks
        self._max_chain = ghosts
        self._clock = clock
        self._fingerprint = fingerprint
        self._state: State = layout.new_state(budget_bytes, max_blocks, ghosts, MAX_TENANTS)
        self._state.numbers[layout.RANDOM] = seed or 1
        self._keys: list[Key | None] = [None] * (max_blocks + ghosts)
        self._tenants: dict[str, int] = {"": 0}
        self._victims = np.empty((2, max_blocks + ghosts), np.int32)

    # -- what it holds

    def __len__(self) -> int:
        return int(self._state.numbers[layout.NUM_HELD])

    def __contains__(self, key: Key) -> bool:
        return self._held_slot(key) >= 0

    @property
    def budget_bytes(self) -> int:
        return int(self._state.numbers[layout.BUDGET_BYTES])

    @property
    def held_bytes(self) -> int:
        return int(self._state.numbers[layout.HELD_BYTES])

    @property
    def num_ghosts(self) -> int:
        return int(num_ghosts(self._state))

    @property
    def evictions(self) -> int:
        return int(self._state.numbers[layout.EVICTIONS])

    # -- requests

    def access(
        self,
        chain: Sequence[Key],
        *,
        num_output_tokens: int | None = None,
        ended_by: TurnEnd = TurnEnd.UNKNOWN,
        since_s: float | None = None,
    ) -> int:
        """A request used this chain, root first; how many leading blocks are held.

        Args:
            num_output_tokens: of the request's answer, if it has ended.
            since_s: the time of this request's earlier call, if there was one: blocks used since
                are not counted again.
        """
        if not chain:
            return 0
        names = self._names(chain[: self._max_chain])
        return int(
            use_chain(
                self._state,
                names,
                float(self._clock()),
                -1 if num_output_tokens is None else num_output_tokens,
                int(ended_by),
                _NO_TIME if since_s is None else since_s,
                np.empty(len(names), np.int32),
            )
        )

    def offer(
        self,
        blocks: Sequence[Key],
        sizes_bytes: Sequence[int],
        saved_ms: Sequence[float] | None = None,
        *,
        parent: Key | None = None,
        tenant: str = "",
    ) -> Admission[Key]:
        """Blocks of one chain could be stored, each the child of the one before.

        Args:
            sizes_bytes: what each would take.
            saved_ms: prefill time that each saves when it hits; all equal if not given.
            parent: the block before the first, if there is one.
        """
        names = self._names(blocks)
        worth = np.ones(len(names)) if saved_ms is None else saved_ms
        slots = np.empty(len(names), np.int32)
        fresh = np.empty(len(names), np.bool_)
        num_victims = admit_chain(
            self._state,
            names,
            np.asarray(sizes_bytes, np.int32),
            np.asarray(worth, np.float32),
            -1 if parent is None else self._held_slot(parent),
            self._tenant(tenant),
            slots,
            fresh,
            self._victims,
        )
        newcomers = dict(zip(slots[fresh].tolist(), itertools.compress(blocks, fresh), strict=True))
        for slot, key in newcomers.items():
            self._keys[slot] = key
        left = set(self._victims[0, :num_victims].tolist())
        victims = self._take_victims(num_victims)
        kept = [
            key
            for slot, key in zip(slots.tolist(), blocks, strict=True)
            if slot >= 0 and slot not in left
        ]
        evicted = victims
        if not left.isdisjoint(newcomers):
            refused = {newcomers[slot] for slot in left if slot in newcomers}
            evicted = [key for key in victims if key not in refused]
        return Admission(kept, evicted)

    def evict(
        self, size_bytes: int, num_blocks: int = 1, *, protected: Iterable[Key] = ()
    ) -> list[Key] | None:
        """Make room for so many more bytes and blocks; the blocks that left, children first.

        None, and nothing has changed, when that cannot be done without `protected` or pinned ones.
        """
        with self._protecting(protected):
            num_victims = int(make_room(self._state, size_bytes, num_blocks, self._victims))
        return None if num_victims < 0 else self._take_victims(num_victims)

    def evict_of(
        self, tenant: str, size_bytes: int, *, protected: Iterable[Key] = ()
    ) -> list[Key] | None:
        """Make room for so many more bytes in a tenant's quota, by its own blocks; as `evict`."""
        row = self._tenant(tenant)
        with self._protecting(protected):
            num_victims = int(make_tenant_room(self._state, row, size_bytes, self._victims))
        return None if num_victims < 0 else self._take_victims(num_victims)

    def has_room(self, size_bytes: int) -> bool:
        """Whether nothing has to leave for one more block of so many bytes."""
        fits = self.held_bytes + size_bytes <= self.budget_bytes
        return fits and len(self) < self.max_blocks

    def insert(
        self,
        key: Key,
        size_bytes: int,
        *,
        saved_ms: float = 1.0,
        parent: Key | None = None,
        tenant: str = "",
    ) -> None:
        """Hold a block for which `evict` made room. A held one keeps its size: see `resize`.

        Raises:
            McpError: it does not fit into the budget.
        """
        held = self._held_slot(key) >= 0
        if not held and not self.has_room(size_bytes):
            raise McpError(
                f"no room for {size_bytes} bytes: {self.held_bytes} of {self.budget_bytes} bytes "
                f"and {len(self)} of {self.max_blocks} blocks are held; call evict() first"
            )
        above = -1 if parent is None else self._held_slot(parent)
        slot = hold_block(
            self._state, self._name(key), size_bytes, saved_ms, above, self._tenant(tenant)
        )
        self._keys[slot] = key

    def remove(self, key: Key) -> None:
        """The owner has dropped this block (its bytes proved bad); no effect if it is not held."""
        slot = self._held_slot(key)
        if slot >= 0:
            release(self._state, slot)
            self._keys[slot] = None

    def resize(self, key: Key, size_bytes: int) -> list[Key]:
        """A held block takes another number of bytes now; the blocks that had to leave for it."""
        slot = self._held_slot(key)
        if slot < 0:
            return []
        resize(self._state, slot, size_bytes)
        num_victims = int(make_room(self._state, 0, 0, self._victims))
        return self._take_victims(max(0, num_victims))

    def clear(self) -> None:
        """Nothing is held any more; what was learned stays."""
        for key in [key for key in self._keys if key is not None]:
            self.remove(key)

    # -- pins and quotas

    def pin(self, keys: Iterable[Key]) -> None:
        """Keep these held blocks until `unpin`; may be done several times."""
        for slot in self._held_slots(keys):
            change_pins(self._state, slot, 1)

    def unpin(self, keys: Iterable[Key]) -> None:
        """Take one pin from each of these; no effect on those that have none."""
        for slot in self._held_slots(keys):
            change_pins(self._state, slot, -1)

    def set_quota(self, tenant: str, quota_bytes: int) -> None:
        """At most so many bytes for a tenant, from its next offer on."""
        self._state.tenants[QUOTA, self._tenant(tenant)] = quota_bytes

    def use_tables(self, tables: Sequence[int]) -> None:
        """Only these of `layout.TABLES` enter the score; a benchmark's ablation asks for it."""
        self._state.active[:] = False
        self._state.active[list(tables)] = True

    # -- for people, and for the next start

    def explain(self, key: Key) -> Explanation | None:
        """Why this block is held, or was evicted; None if nothing is remembered of it."""
        slot = self._slot(key)
        return None if slot < 0 else explanation.of(self._state, slot, float(self._clock()))

    def save(self, max_bytes: int = sys.maxsize) -> bytes:
        """What was learned, and the history of the blocks used last, for `restore`.

        Raises:
            McpError: `max_bytes` are too few for what was learned.
        """
        return saved.dump(self._state, float(self._clock()), max_bytes)

    def restore(self, image: bytes) -> None:
        """Take over what another cache learned; call it before anything else.

        Blocks are not held by this: `insert` those whose bytes are still there.

        Raises:
            McpError: the image is damaged, or of another version.
        """
        saved.load(self._state, image, float(self._clock()))

    def check_integrity(self) -> None:
        """Recount everything; for tests.

        Raises:
            AssertionError: the accounts and the contents differ.
        """
        explanation.check(self._state)
        held = {slot for slot, key in enumerate(self._keys) if key is not None}
        assert held == set(np.flatnonzero(self._state.records["flags"] & HELD).tolist())

    @contextmanager
    def _protecting(self, keys: Iterable[Key]) -> Iterator[None]:
        slots = self._held_slots(keys)
        flags = self._state.records["flags"]
        flags[slots] |= PROTECTED
        yield
        flags[slots] &= 0xFF ^ PROTECTED

    def _name(self, key: Key) -> np.uint64:
        return np.uint64(self._fingerprint(key))

    def _names(self, keys: Sequence[Key]) -> NDArray[np.uint64]:
        name = self._fingerprint
        return np.fromiter((name(key) for key in keys), np.uint64, len(keys))

    def _slot(self, key: Key) -> int:
        found = np.empty(1, np.int32)
        find_all(self._state, self._names([key]), found)
        return int(found[0])

    def _held_slot(self, key: Key) -> int:
        return next(iter(self._held_slots([key])), -1)

    def _held_slots(self, keys: Iterable[Key]) -> list[int]:
        """The slots of those that are held."""
        wanted = list(keys)
        found = np.empty(len(wanted), np.int32)
        find_all(self._state, self._names(wanted), found)
        return [
            slot
            for slot, key in zip(found.tolist(), wanted, strict=True)
            if slot >= 0 and self._keys[slot] == key
        ]

    def _tenant(self, tenant: str) -> int:
        """Its row; tenants beyond the number that are told apart share the row of no tenant."""
        row = self._tenants.get(tenant)
        if row is None:
            row = len(self._tenants) if len(self._tenants) < MAX_TENANTS else 0
            if row:
                self._tenants[tenant] = row
        return row

    def _take_victims(self, count: int) -> list[Key]:
        keys: list[Key] = []
        for slot in self._victims[0, :count].tolist():
            key = self._keys[slot]
            assert key is not None
            keys.append(key)
            self._keys[slot] = None
        return keys
