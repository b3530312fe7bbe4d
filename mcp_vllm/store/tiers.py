"""Memory, disk and a shared store behind each other: where a chunk is, and how it comes up and goes
down.

A chunk is offered to the disk, and to the shared store, as soon as it is a frame, and to the disk
again when memory evicts it: the disk's policy says whether it is kept there, memory's whether a hit
below comes up. Both learn from the same uses. What a killed agent had on disk is there for the
next. What lies in the shared store only is not here: it is found by `locate`, and known for a
while. Without either all of this is what memory alone does. Owned by the agent's event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from mcp_vllm.security.seals import key_id_of
from mcp_vllm.store.disk import DiskTier, Record, StoredFrame, Use
from mcp_vllm.store.disk.entry import Entry
from mcp_vllm.store.ram import Chunk, ChunkKey, RamStore
from mcp_vllm.store.shared import SharedTier

# What is known of a chunk without reading it: `layout`, `raw_bytes`, `loss`, and see `seal_id_of`.
Held = Chunk | Record | StoredFrame
Reachable = Held | Entry


def seal_id_of(held: Reachable) -> str:
    """The key that its frame is sealed with; empty: it is not sealed, or no frame yet."""
    if isinstance(held, Chunk):
        return key_id_of(held.frame) if held.frame is not None else ""
    return held.seal_id


class Tiers:
    """See the module's docstring.

    Attributes:
        watchers: each called with a name and whether it has come to memory or disk, or left both.
    """

    def __init__(
        self, ram: RamStore, disk: DiskTier | None = None, shared: SharedTier | None = None
    ) -> None:
        self._ram = ram
        self._disk = disk
        self._shared = shared
        self.watchers: list[Callable[[ChunkKey, bool], None]] = []
        ram.watchers.append(self._changed)
        if disk is not None:
            disk.watchers.append(self._changed)
        if disk is not None or shared is not None:
            ram.framed.append(self._keep_below)

    @property
    def disk(self) -> DiskTier | None:
        return self._disk

    @property
    def shared(self) -> SharedTier | None:
        return self._shared

    def __contains__(self, name: ChunkKey) -> bool:
        return self.find(name) is not None

    def __iter__(self) -> Iterator[ChunkKey]:
        """Every name once."""
        yield from list(self._ram)
        if self._disk is not None:
            yield from (name for name in self._disk if name not in self._ram)

    def find(self, name: ChunkKey) -> Held | None:
        """The chunk, in memory or on disk; None: it is not here. Does not count as a use."""
        chunk = self._ram.get(name)
        if chunk is not None or self._disk is None:
            return chunk
        return self._disk.find(name)

    def reach(self, name: ChunkKey) -> Reachable | None:
        """The chunk here, or as it was found in the shared store lately. Nobody is asked."""
        held = self.find(name)
        return self._shared.find(name) if held is None and self._shared is not None else held

    async def locate(self, names: Iterable[ChunkKey], deadline_s: float) -> None:
        """Ask the shared store for these, where there is one: `reach` finds them then."""
        if self._shared is not None:
            await self._shared.locate(names, deadline_s)

    async def get(self, name: ChunkKey) -> Chunk | None:
        """The chunk with its bytes, brought up into memory if worth that; None: it is gone."""
        chunk = self._ram.get(name)
        for tier in (self._disk, self._shared):
            if chunk is None and tier is not None:
                chunk = await tier.get(name)
                # Not what was discarded while it was read.
                if chunk is not None and tier.find(name) is not None:
                    self._ram.offer(name, chunk)
        return chunk

    async def persist(self, names: Sequence[ChunkKey]) -> bool:
        """Write these to disk where they are not yet; whether all of them are there then, as good
        as they are in memory."""
        if self._disk is None:
            return False
        held = {name: self._ram.get(name) for name in names}
        losses = {name: None if chunk is None else chunk.loss for name, chunk in held.items()}
        missing, before = list(names), len(names) + 1
        while missing and len(missing) < before:
            for name in missing:
                chunk = self._ram.get(name)
                if chunk is not None and chunk.frame is not None:
                    self._keep_below(name, chunk)
            await self._disk.flush()
            before = len(missing)
            # All of them: the disk's policy may have let one go for another.
            missing = [name for name in names if not self._disk.has_written(name, losses[name])]
        return not missing

    def touch(
        self,
        names: Iterable[ChunkKey],
        *,
        num_output_tokens: int | None = None,
        since_s: float | None = None,
    ) -> None:
        """A request used this chain of one KV cache group, root first, whether it is here or not.

        Args:
            num_output_tokens: of its answer, where it has ended.
            since_s: what was used at that time (`time.monotonic`) or later, was by this request.
        """
        chain = list(names)
        if chain:
            self._ram.touch(chain, num_output_tokens=num_output_tokens, since_s=since_s)
            if self._disk is not None:
                self._disk.touch(Use(chain, num_output_tokens, since_s))

    def discard(self, name: ChunkKey) -> None:
        """Forget the chunk in every tier."""
        self.discard_here(name)
        if self._shared is not None:
            self._shared.discard(name)

    def discard_here(self, name: ChunkKey) -> None:
        """Forget the chunk in memory and on disk; others may need it in the shared store."""
        self._ram.discard(name)
        if self._disk is not None:
            self._disk.discard(name)

    def _keep_below(self, name: ChunkKey, chunk: Chunk) -> None:
        assert chunk.frame is not None
        stored = StoredFrame(
            name, chunk.frame, chunk.layout, chunk.raw_bytes, chunk.loss, seal_id_of(chunk)
        )
        for tier in (self._disk, self._shared):
            if tier is not None:
                tier.put(stored)

    def _changed(self, name: ChunkKey, present: bool) -> None:
        held = name in self
        if present == held:
            for watcher in self.watchers:
                watcher(name, present)
