"""What one peer says it has, chunks and sessions: the reader's side of `directory_wire`, without a
socket.

Fed by `directory_link`, asked by `peers`. Whatever the peer sends, the view ends as the peer's own
state, or is not `is_whole` and nobody relies on it. Owned by the agent's event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mcp_vllm.agent import directory_wire
from mcp_vllm.agent.chunk_set import ABSENT, ChunkSet, Hashes
from mcp_vllm.agent.directory_wire import (
    About,
    Beat,
    Changes,
    Entries,
    Follow,
    Message,
    SessionNews,
    SessionState,
    Slice,
    Start,
    Whole,
)
from mcp_vllm.agent.reader import Reader
from mcp_vllm.agent.wire import WIRE_VERSION, WireError
from mcp_vllm.codec.loss import LOSSES, is_acceptable
from mcp_vllm.errors import McpError

# What a session costs in memory, in entries of a `ChunkSet`.
SESSION_WEIGHT = 14
# Kinds of readers, of which there are few, whose accepted kinds of chunks are remembered.
MAX_KINDS = 64


class DirectoryGap(McpError):
    """Messages are missing: what is known is worth nothing."""


class DirectoryTooLarge(McpError):
    """The peer has more than this agent can note."""


class DirectoryView:
    """One peer's chunks, as announced.

    Args:
        max_entries: how many may be noted; asked again with every message.

    Attributes:
        agent_id: of the process that is followed; empty until it has said so.
        is_whole: the snapshot is complete and no change is missing.
    """

    def __init__(self, max_entries: Callable[[], int]) -> None:
        self._max_entries = max_entries
        self.agent_id = ""
        self.is_whole = False
        self.about = About("", {}, [])
        self._seq = 0
        self._begun = False
        self._in_snapshot = False
        self._chunks: dict[bytes, ChunkSet] = {}
        self._sessions: dict[int, SessionState] = {}
        self._kinds: dict[tuple[tuple[str, ...], tuple[str, ...]], Sequence[int]] = {}

    @property
    def weight(self) -> int:
        """Entries, those in recent changes at their price in memory (`ChunkSet.weight`)."""
        of_chunks = sum(chunks.weight for chunks in self._chunks.values())
        return of_chunks + SESSION_WEIGHT * len(self._sessions)

    @property
    def num_chunks(self) -> int:
        return sum(len(chunks.snapshot().hashes) for chunks in self._chunks.values())

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def session(self, name: int) -> SessionState | None:
        """How far the session of that `session_hash` is there; None: it is not there."""
        return self._sessions.get(name)

    def follow(self) -> Follow:
        """What to ask the peer for: the changes since what is known, or everything.

        A new stream begins: what was half told in the one before is forgotten.
        """
        self._begun = False
        if not self.is_whole:
            self.forget()
            return Follow(WIRE_VERSION)
        return Follow(WIRE_VERSION, self.agent_id, self._seq)

    def forget(self) -> None:
        """Know nothing, as at the beginning, but who it was."""
        self.is_whole = self._in_snapshot = False
        self._seq = 0
        self._chunks.clear()
        self._sessions.clear()

    def apply(self, message: Message) -> None:
        """Take one message.

        Raises:
            WireError: it may not come here. DirectoryGap: something is missing before it.
            DirectoryTooLarge: too much to note. After each of them everything is forgotten.
        """
        try:
            self._apply(message)
            if self.weight > self._max_entries():
                raise DirectoryTooLarge(f"it has more than {self._max_entries()} entries")
        except McpError:
            self.forget()
            raise

    def knows(self, namespace: bytes) -> bool:
        """Whether the peer has engines, or chunks, of that namespace."""
        return namespace in self.about.send_bytes_s or namespace in self._chunks

    def find(
        self,
        namespace: bytes,
        hashes: Hashes,
        lossy: Collection[str],
        opens: Collection[str] = (),
    ) -> NDArray[np.bool_]:
        """Shape (len(hashes),): which are there with no loss other than of tiers `lossy`, sealed
        with one of the keys `opens`; without any: not sealed."""
        chunks = self._chunks.get(namespace)
        if chunks is None:
            return np.zeros(len(hashes), dtype=bool)
        ranks, accepted = chunks.ranks_of(hashes), self._accepted(tuple(lossy), tuple(opens))
        return np.equal(ranks, accepted[0]) if len(accepted) == 1 else np.isin(ranks, accepted)

    def _accepted(self, lossy: tuple[str, ...], opens: tuple[str, ...]) -> Sequence[int]:
        """The kinds of chunks that such a reader can use; remembered for the next one like it."""
        asked = (lossy, opens)
        if asked not in self._kinds:
            if len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            self._kinds[asked] = [
                directory_wire.NUM_LOSSES * place + its_rank
                for place, seal in enumerate(self.about.seals)
                if seal in (opens or ("",))
                for its_rank, loss in enumerate(LOSSES)
                if is_acceptable(loss, lossy)
            ]
        return self._kinds[asked]

    def find_any(
        self, namespace: bytes, hashes: Sequence[Hashes], reader: Reader
    ) -> NDArray[np.bool_]:
        """Which keys `reader` can use a chunk of; `hashes` are those of its tenants, one after the
        other (`chunk_set.hash_as`)."""
        opens = reader.opens or [()] * len(reader.tenants)
        found, *others = (
            self.find(namespace, of_tenant, reader.lossy, ids)
            for of_tenant, ids in zip(hashes, opens, strict=True)
        )
        for each in others:
            found |= each
        return found

    def has_all(self, namespace: bytes, hashes: Hashes) -> bool:
        """Whether all of these are there, readable here or not."""
        chunks = self._chunks.get(namespace)
        if chunks is None:
            return not len(hashes)
        return bool(np.all(chunks.ranks_of(hashes) != ABSENT))

    def drop(self, namespace: bytes, hashes: Hashes) -> None:
        """These proved not to be there: do not believe in them until they are announced again."""
        if namespace in self._chunks:
            self._chunks[namespace].remove(hashes)

    def ranks(self, namespace: bytes) -> dict[int, int]:
        """Hash -> rank of all that is noted; for tests and reports."""
        hashes, ranks = self._chunks.get(namespace, ChunkSet()).snapshot()
        return dict(zip(hashes.tolist(), ranks.tolist(), strict=True))

    def _apply(self, message: Message) -> None:
        if not self._begun and not isinstance(message, Start):
            raise WireError("malformed", "a stream without a start")
        match message:
            case Start():
                self._start(message)
            case About():
                self.about = message
                self._kinds.clear()
            case Slice():
                if not self._in_snapshot:
                    raise WireError("malformed", "a part of a snapshot that has not begun")
                self._note(message.entries)
                self._note_sessions(message.sessions)
            case Whole():
                if not self._in_snapshot or message.seq != self._seq:
                    raise WireError("malformed", "the end of a snapshot that has not begun")
                told = (message.num_chunks, message.num_sessions)
                if told != (self.num_chunks, self.num_sessions):
                    raise DirectoryGap("a part of the snapshot is missing")
                self._in_snapshot, self.is_whole = False, True
            case Changes():
                self._expect(message.seq, self._seq + 1)
                self._note(message.entries)
                self._note_sessions(message.sessions)
                self._seq = message.seq
            case Beat():
                self._expect(message.seq, self._seq)

    def _start(self, message: Start) -> None:
        self._begun = True
        if not message.resumed:
            self.forget()
            self.agent_id, self._seq, self._in_snapshot = message.agent_id, message.seq, True
            return
        if not self.is_whole or message.agent_id != self.agent_id:
            raise WireError("malformed", "it goes on with what was not asked for")
        self._expect(message.seq, self._seq)

    def _expect(self, seq: int, expected: int) -> None:
        if not self.is_whole:
            raise WireError("malformed", "changes before the snapshot is complete")
        if seq != expected:
            raise DirectoryGap(f"change {seq} came in the place of {expected}")

    def _note(self, entries: Iterable[Entries]) -> None:
        for each in entries:
            chunks = self._chunks.get(each.namespace)
            if chunks is None:
                self._make_room()
                chunks = self._chunks[each.namespace] = ChunkSet()
            for its_rank, packed in enumerate(each.added):
                if packed:
                    chunks.add(directory_wire.from_wire(packed), its_rank)
            if each.removed:
                chunks.remove(directory_wire.from_wire(each.removed))

    def _note_sessions(self, news: SessionNews) -> None:
        self._sessions.update(directory_wire.unpack_sessions(news.put))
        for name in directory_wire.from_wire(news.gone).tolist():
            self._sessions.pop(name, None)

    def _make_room(self) -> None:
        """For one more namespace; the empty ones leave. Raises DirectoryTooLarge."""
        if len(self._chunks) < directory_wire.MAX_NAMESPACES:
            return
        self._chunks = {name: each for name, each in self._chunks.items() if not each.is_empty()}
        if len(self._chunks) >= directory_wire.MAX_NAMESPACES:
            raise DirectoryTooLarge("it has chunks of more namespaces than can be noted")
