"""Memory and disk behind each other: where a chunk is, and how it comes up and goes down.

A chunk is offered to the disk as soon as it is a frame, and again when memory evicts it: the disk's
policy says whether it is kept there, memory's whether a hit on disk comes up. Both learn from the
same uses. What a killed agent had on disk is there for the next. Without a disk all of this is what
memory alone does. Owned by the agent's event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from mcp_vllm.security.seals import key_id_of
from mcp_vllm.store.disk import DiskTier, Record, StoredFrame, Use
from mcp_vllm.store.ram import Chunk, ChunkKey, RamStore

# What is known of a chunk without reading it: `layout`, `raw_bytes`, `loss`, and see `seal_id_of`.
Held = Chunk | Record | StoredFrame


def seal_id_of(held: Held) -> str:
    """The key that its frame is sealed with; empty: it is not sealed, or no frame yet."""
    if isinstance(held, Chunk):
        return key_id_of(held.frame) if held.frame is not None else ""
    return held.seal_id


class Tiers:
    """See the module's docstring.

    Attributes:
        watchers: each called with a name and whether it has come to one of the tiers, or left the
            last that had it.
    """

    def __init__(self, ram: RamStore, disk: DiskTier | None = None) -> None:
        self._ram = ram
        self._disk = disk
        self.watchers: list[Callable[[ChunkKey, bool], None]] = []
        ram.watchers.append(self._changed)
        if disk is not None:
            disk.watchers.append(self._changed)
            ram.framed.append(self._keep_on_disk)

    @property
    def disk(self) -> DiskTier | None:
        return self._disk

    def __contains__(self, name: ChunkKey) -> bool:
        return self.find(name) is not None

    def __iter__(self) -> Iterator[ChunkKey]:
        """Every name once."""
        yield from list(self._ram)
        if self._disk is not None:
            yield from (name for name in self._disk if name not in self._ram)

    def find(self, name: ChunkKey) -> Held | None:
        """The chunk, in whichever tier it is; None: in none. Does not count as a use."""
        chunk = self._ram.get(name)
        if chunk is not None or self._disk is None:
            return chunk
        return self._disk.find(name)

    async def get(self, name: ChunkKey) -> Chunk | None:
        """The chunk with its bytes, brought up into memory if worth that; None: it is gone."""
        chunk = self._ram.get(name)
        if chunk is not None or self._disk is None:
            return chunk
        chunk = await self._disk.get(name)
        if chunk is not None:
            self._ram.offer(name, chunk)
        return chunk

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
        self._ram.discard(name)
        if self._disk is not None:
            self._disk.discard(name)

    def _keep_on_disk(self, name: ChunkKey, chunk: Chunk) -> None:
        assert self._disk is not None
        assert chunk.frame is not None
        self._disk.put(
            StoredFrame(
                name, chunk.frame, chunk.layout, chunk.raw_bytes, chunk.loss, seal_id_of(chunk)
            )
        )

    def _changed(self, name: ChunkKey, present: bool) -> None:
        held = name in self
        if present == held:
            for watcher in self.watchers:
                watcher(name, present)
