"""Tells peers what is here, chunks and sessions: all of it at first, then every change
(`directory_wire`).

Changes are collected, encoded once for all who follow, and kept in a log of bounded size; each
follower has its own place in it and gets a snapshot when the log does not reach back so far. So no
follower, however slow, holds memory. Owned by the agent's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator

import numpy as np

from mcp_vllm.agent import directory_wire, wire
from mcp_vllm.agent.chunk_set import ChunkSet, hash_keys
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.directory_wire import (
    MAX_HASHES,
    MAX_SEALS,
    MAX_SESSIONS,
    NUM_LOSSES,
    About,
    Beat,
    Changes,
    Entries,
    SessionNews,
    SessionState,
    Start,
    Whole,
    session_hash,
)
from mcp_vllm.codec.loss import rank
from mcp_vllm.link.prefill import PrefillCost
from mcp_vllm.session.manifest import Manifest, SessionKey
from mcp_vllm.store.ram import ChunkKey

# After a message the next changes are collected for so long: that is once in a load, not for each
# chunk, on either side.
BATCH_S = 0.03
LOG_BYTES = 1 << 20
# Of fingerprints in one message, names and UTF-8 on top: well below the bound of a message.
ABOUT_CHARS = 128 << 10
PREFILLS_S = 2.0
# In the place of a kind.
GONE = -1


class Announcer:
    """One per agent.

    Attributes:
        seq: number of the last change that was encoded; the first is 1.
    """

    def __init__(self, context: AgentContext, log_bytes: int = LOG_BYTES) -> None:
        self._context = context
        self._log_bytes = log_bytes
        self.seq = 0
        self._chunks: dict[bytes, ChunkSet] = {}
        # What frames are or were sealed with, by place.
        self._seals: dict[str, int] = {"": 0}
        self._prefills: dict[bytes, PrefillCost] = {}
        self._prefills_due_s = 0.0
        self._pending: dict[ChunkKey, None] = {}
        self._sessions: dict[int, SessionState] = {}
        self._pending_sessions: dict[int, SessionState | None] = {}
        self._timer: asyncio.Handle | None = None
        self._sent_s = 0.0
        self._log: dict[int, bytes] = {}
        self._held_bytes = 0
        self._followers: set[asyncio.Event] = set()
        self._closed = False

    def start(self) -> None:
        """Watch what is in memory and on disk, and the sessions."""
        for name in self._context.tiers:
            self._changed(name, True)
        self._context.tiers.watchers.append(self._changed)
        self._context.seals.watchers.append(self._keys_changed)
        for manifest in self._context.sessions:
            self._session_changed(manifest.key, manifest)
        self._context.sessions.watchers.append(self._session_changed)

    def close(self) -> None:
        """End every stream; idempotent."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._changed in self._context.tiers.watchers:
            self._context.tiers.watchers.remove(self._changed)
            self._context.sessions.watchers.remove(self._session_changed)
            self._context.seals.watchers.remove(self._keys_changed)
        self._wake()

    @property
    def num_followers(self) -> int:
        return len(self._followers)

    async def stream(self, asked: directory_wire.Follow) -> AsyncGenerator[bytes, None]:
        """What that follower is told, packed, until it has had enough or `close`."""
        agent_id = self._context.agent_id
        place = asked.seq if asked.agent_id == agent_id and self._reaches(asked.seq) else None
        if place is not None:
            yield directory_wire.pack(Start(agent_id, place, True))
        about, woken = b"", asyncio.Event()
        self._followers.add(woken)
        try:
            while not self._closed:
                if place is None or not self._reaches(place):
                    self._flush()
                    place = self.seq
                    about = directory_wire.pack(self._about())
                    for message in self._snapshot(about):
                        yield message
                known, about = about, directory_wire.pack(self._about())
                if about != known:
                    yield about
                while place < self.seq and self._reaches(place):
                    place += 1
                    yield self._log[place]
                if place == self.seq and not await _happens(woken, directory_wire.BEAT_S):
                    yield directory_wire.pack(Beat(place))
                woken.clear()
        finally:
            self._followers.discard(woken)

    # ---- changes ----------------------------------------------------------------------------

    def _changed(self, name: ChunkKey, present: bool) -> None:
        self._pending[name] = None
        self._soon()

    def _keys_changed(self) -> None:
        """What is not a frame yet will be sealed with another key: say anew of every chunk."""
        for name in self._context.tiers:
            self._changed(name, True)

    def _session_changed(self, key: SessionKey, manifest: Manifest | None) -> None:
        state = None if manifest is None else SessionState(manifest.turns, manifest.num_tokens)
        self._pending_sessions[session_hash(key)] = state
        self._soon()

    def _soon(self) -> None:
        """Tell the changes after a moment, or now, when there are as many as a message holds."""
        if len(self._pending) >= MAX_HASHES or len(self._pending_sessions) >= MAX_SESSIONS:
            self._flush()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            wait_s = self._sent_s + BATCH_S - loop.time()
            self._timer = loop.call_later(max(0.0, wait_s), self._flush)

    def _flush(self) -> None:
        """Encode what has changed, for all followers."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._pending and not self._pending_sessions:
            return
        names, self._pending = list(self._pending), {}
        self._sent_s = asyncio.get_running_loop().time()
        self.seq += 1
        changes = Changes(self.seq, list(self._entries(names)), self._session_news())
        message = directory_wire.pack(changes)
        self._log[self.seq] = message
        self._held_bytes += len(message)
        while self._held_bytes > self._log_bytes:
            self._held_bytes -= len(self._log.pop(next(iter(self._log))))
        self._wake()

    def _entries(self, names: Iterable[ChunkKey]) -> Iterator[Entries]:
        """The names as they are now, noted in our own sets too."""
        by_namespace: dict[bytes, dict[tuple[int, str], list[bytes]]] = {}
        for name in names:
            of_kind = by_namespace.setdefault(name.namespace, {})
            of_kind.setdefault((self._kind_of(name), name.tenant), []).append(name.key)
        for namespace, of_kind in by_namespace.items():
            chunks = self._chunks.setdefault(namespace, ChunkSet())
            entries = Entries(namespace, [b""] * (1 + max(kind for kind, _ in of_kind)))
            for (kind, tenant), keys in of_kind.items():
                hashes = hash_keys(keys, tenant)
                if kind == GONE:
                    chunks.remove(hashes)
                    entries.removed += directory_wire.to_wire(hashes)
                else:
                    chunks.add(hashes, kind)
                    entries.added[kind] += directory_wire.to_wire(hashes)
            yield entries

    def _session_news(self) -> SessionNews:
        """What is pending of the sessions, noted as told."""
        changed, self._pending_sessions = self._pending_sessions, {}
        put = {name: state for name, state in changed.items() if state is not None}
        gone = [name for name in changed if name not in put]
        self._sessions.update(put)
        for name in gone:
            self._sessions.pop(name, None)
        hashes = np.array(gone, dtype=np.uint64)
        return SessionNews(directory_wire.pack_sessions(put), directory_wire.to_wire(hashes))

    def _kind_of(self, name: ChunkKey) -> int:
        """As in `directory_wire`; GONE also for what nobody can ask for: a loss that has no name,
        or one key more than can be told."""
        held = self._context.tiers.find(name)
        if held is None or rank(held.loss) >= NUM_LOSSES:
            return GONE
        seal = self._context.sealed_by(name, held)
        if seal not in self._seals and len(self._seals) < MAX_SEALS:
            self._seals[seal] = len(self._seals)
        place = self._seals.get(seal)
        return GONE if place is None else NUM_LOSSES * place + rank(held.loss)

    # ---- followers --------------------------------------------------------------------------

    def _reaches(self, place: int) -> bool:
        """Whether every change after `place` is in the log."""
        return place == self.seq or place + 1 in self._log

    def _wake(self) -> None:
        for each in self._followers:
            each.set()

    def _snapshot(self, about: bytes) -> Iterator[bytes]:
        """Start to Whole; the sets are frozen before the first message is asked for.

        `about` comes before the chunks: without it a follower could not say how to have them.
        """
        seq = self.seq
        self._chunks = {name: each for name, each in self._chunks.items() if not each.is_empty()}
        frozen = {namespace: chunks.snapshot() for namespace, chunks in self._chunks.items()}
        sessions = list(self._sessions.items())
        yield directory_wire.pack(Start(self._context.agent_id, seq, False))
        yield about
        for namespace, (hashes, ranks) in frozen.items():
            for first in range(0, len(hashes), MAX_HASHES):
                end = first + MAX_HASHES
                part, of_part = hashes[first:end], ranks[first:end]
                kinds = range(NUM_LOSSES * len(self._seals))
                added = [part[of_part == each] for each in kinds]
                packed = [directory_wire.to_wire(each) for each in added]
                yield directory_wire.pack(directory_wire.Slice([Entries(namespace, packed)]))
        for first in range(0, len(sessions), MAX_SESSIONS):
            some = dict(sessions[first : first + MAX_SESSIONS])
            news = SessionNews(directory_wire.pack_sessions(some))
            yield directory_wire.pack(directory_wire.Slice([], news))
        num_chunks = sum(len(each.hashes) for each in frozen.values())
        yield directory_wire.pack(Whole(seq, num_chunks, len(sessions)))

    def _about(self) -> About:
        context = self._context
        known = list(context.fingerprints.values())
        speeds = {each: context.codecs.sending_speeds(each) for each in context.fingerprints}
        fields = [dict(each.fields) for each in known[-wire.MAX_FINGERPRINTS :]]
        while sum(len(text) for each in fields for text in each.values()) > ABOUT_CHARS:
            del fields[0]
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._prefills_due_s:  # they change with every request
            self._prefills, self._prefills_due_s = dict(context.prefills), now_s + PREFILLS_S
        return About(context.config.codec.name, speeds, fields, tuple(self._seals), self._prefills)


async def _happens(event: asyncio.Event, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
