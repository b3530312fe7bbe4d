"""What can be done with a session: copy, move, fork, pin, park, export, import, delete, drain.

All of it works on manifests and chunks of this agent's store; between agents the receiver pulls.
Errors are `SessionError`s, which the HTTP interface turns into answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from weakref import WeakValueDictionary

import msgspec

from mcp_vllm.agent import wire
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.disk import KeptSessions
from mcp_vllm.agent.encoder import Encoder
from mcp_vllm.agent.parking import ParkingFolder, ParkingFull
from mcp_vllm.agent.peer import Peer, PeerFailure
from mcp_vllm.agent.peers import Peers
from mcp_vllm.agent.session_error import NOTHING_HERE, SessionError
from mcp_vllm.agent.session_files import SessionFiles
from mcp_vllm.agent.session_transfer import SessionTransfer, TransferError
from mcp_vllm.session.api import DrainStep, SessionHolder, Transfer
from mcp_vllm.session.manifest import Manifest, SessionKey, checked_name
from mcp_vllm.store.ram import ChunkKey

logger = logging.getLogger(__name__)

# A session that is used while it moves is copied again, this often; then the move is given up.
MOVE_ROUNDS = 3


class Sessions:
    """One per agent, owned by its event loop."""

    def __init__(
        self,
        context: AgentContext,
        encoder: Encoder,
        peers: Peers,
        parking: ParkingFolder | None,
        kept: KeptSessions | None,
    ) -> None:
        self._context = context
        self._encoder = encoder
        self._files = SessionFiles(context, encoder)
        self._peers = peers
        self._parking = parking
        self._kept = kept
        self._locks: WeakValueDictionary[SessionKey, asyncio.Lock] = WeakValueDictionary()
        context.sessions.over_quota.append(self._forgotten)

    # ---- looking ----------------------------------------------------------------------------

    def get(self, key: SessionKey) -> Manifest:
        """Raises SessionError(404)."""
        manifest = self._context.sessions.get(key)
        if manifest is None:
            raise SessionError(404, "no such session")
        return manifest

    def holders(self, key: SessionKey) -> list[SessionHolder]:
        """The peers that say they have it, the furthest first."""
        return [
            SessionHolder(peer.name, state.turns, state.num_tokens)
            for peer, state in self._peers.holders_of(key)
        ]

    def sizes(self, manifest: Manifest) -> dict[bytes, int]:
        """Raw bytes of each of the session's chunks that are here.

        Raises:
            SessionError: 409, there are none (any more).
        """
        held = self._context.held(manifest)
        if not held:
            raise SessionError(409, NOTHING_HERE)
        return {name.key: chunk.raw_bytes for name, chunk in held.items()}

    # ---- on this host -----------------------------------------------------------------------

    def fork(self, key: SessionKey, new_id: str) -> Manifest:
        """The same context under another name; no chunk is copied."""
        source = self.get(key)
        target = SessionKey(key.tenant, checked_name("session id", new_id))
        if self._context.sessions.get(target) is not None:
            raise SessionError(409, f"session {new_id} exists already")
        if source.parked:
            raise SessionError(409, "the session is parked: wake it first")
        now_s = time.time()
        forked = msgspec.structs.replace(
            source, key=target, created_s=now_s, last_used_s=now_s, replica_of=""
        )
        self._context.sessions.put(forked)
        return forked

    def pin(self, key: SessionKey, ttl_s: float) -> None:
        if not self._context.pins.pin(self.get(key), ttl_s):
            raise SessionError(507, "pinned sessions would hold more than half of the memory")

    def unpin(self, key: SessionKey) -> None:
        self.get(key)
        self._context.pins.unpin(key)

    def delete(self, key: SessionKey) -> None:
        """Forget the session and the chunks that no other session has."""
        manifest = self.get(key)
        self._context.sessions.remove(key)
        self._forgotten(manifest, everywhere=True)

    def _release(self, manifest: Manifest) -> None:
        """Forget a session that goes on elsewhere."""
        self._context.sessions.remove(manifest.key)
        self._forgotten(manifest)

    def _forgotten(self, manifest: Manifest, *, everywhere: bool = False) -> None:
        """The session is not in the registry any more: nor is anything of it anywhere here, or, if
        it has ended, in the shared store."""
        if self._parking is not None:
            self._parking.remove(manifest.key)
        self._context.pins.unpin(manifest.key)
        self._drop_unused(manifest, everywhere=everywhere)

    def _drop_unused(self, manifest: Manifest, *, everywhere: bool = False) -> None:
        tenant, context = manifest.key.tenant, self._context
        if tenant in context.config.tenants.shared:
            return  # sessions of other tenants may rely on them: they leave by eviction only
        discard = context.tiers.discard if everywhere else context.tiers.discard_here
        for key in context.sessions.unused(manifest):
            discard(ChunkKey(manifest.namespace, key, tenant))

    @property
    def files(self) -> SessionFiles:
        """Export and import."""
        return self._files

    # ---- to and from files ------------------------------------------------------------------

    async def park(self, key: SessionKey) -> None:
        """Write the session to the parking folder and free its memory."""
        if self._parking is None:
            raise SessionError(409, "no folder to park sessions in: set agent.parking_folder")
        async with self._lock(key):
            manifest = self.get(key)
            if manifest.parked:
                return
            await self._write_parked(key)
            if self._context.sessions.get(key) is not manifest:
                raise SessionError(409, "the session was used while it was being parked")
            self._context.pins.unpin(key)
            self._context.sessions.put(msgspec.structs.replace(manifest, parked=True, chains=[]))
            self._drop_unused(manifest)

    async def _write_parked(self, key: SessionKey) -> None:
        assert self._parking is not None
        try:
            await self._parking.write(key, self._files.export(self.get(key)))
        except ParkingFull as error:
            raise SessionError(507, str(error)) from error
        except OSError as error:
            raise SessionError(507, f"agent.parking_folder: {error.strerror}") from error

    async def wake(self, key: SessionKey) -> Manifest:
        """Bring a parked session back into memory. Its file stays until the session leaves this
        agent: memory does not outlive the process."""
        async with self._lock(key):
            manifest = self.get(key)
            if not manifest.parked:
                return manifest
            assert self._parking is not None
            return await self._files.import_archive(self._parking.read(key), owner=key)

    # ---- between agents ---------------------------------------------------------------------

    async def pull(self, key: SessionKey, asked: wire.SessionPull) -> Transfer:
        """Fetch the session from the peer that `asked` names; it appears once it is whole.

        Where the peer is going to release it and there is a parking folder or a disk, this ends
        only when the session would survive the end of this agent.
        """
        return await self._pull(key, await self._peer_with_id(asked.agent_id), asked)

    def release_replica(self, key: SessionKey, agent_id: str) -> None:
        """The agent of that id needs its copy no more: forget it, unless it is (by now) a session
        that lives here, or the copy of another agent that is there. Raises SessionError(404)."""
        manifest = self.get(key)
        if not manifest.replica_of:
            return
        if manifest.replica_of == agent_id or not self._peers.is_there(manifest.replica_of):
            self._release(manifest)

    async def prefetch(self, key: SessionKey) -> Transfer:
        """Fetch the session from the peer where it is furthest, as announced; the others are asked
        after those, since what was announced may be a moment old."""
        causes = []
        holders = [peer for peer, _ in self._peers.holders_of(key)]
        for peer in (*holders, *(each for each in self._peers if each not in holders)):
            try:
                return await self._pull(key, peer, wire.SessionPull(""))
            except (PeerFailure, SessionError) as error:
                causes.append(str(error))
        raise SessionError(404, f"no peer gave the session: {'; '.join(causes) or 'none there'}")

    async def _pull(self, key: SessionKey, peer: Peer, asked: wire.SessionPull) -> Transfer:
        async with self._lock(key):
            was_here = self._context.sessions.get(key) is not None
            try:
                manifest, sizes = await peer.manifest(key)
                if asked.replica:
                    self._check_replica(manifest)
                transfer = SessionTransfer(self._context, peer, manifest, sizes, asked.bytes_s)
                report = await transfer.run()
            except (PeerFailure, TransferError) as error:
                raise SessionError(502, str(error)) from error
            if asked.replica:
                self._check_replica(manifest)  # a turn may have ended here meanwhile
            home = asked.agent_id if asked.replica else ""
            self._context.appear(msgspec.structs.replace(manifest, parked=False, replica_of=home))
            if asked.releases:
                try:
                    await self._secure(self.get(key))
                except SessionError:
                    if not was_here:  # the peer keeps it: this is a copy
                        copied = msgspec.structs.replace(self.get(key), replica_of=asked.agent_id)
                        self._context.sessions.put(copied)
                    raise
            return report

    async def _secure(self, manifest: Manifest) -> None:
        """Return when the session would survive the end of this agent, where there is a parking
        folder or a disk. Raises SessionError(507)."""
        if self._parking is not None:
            await self._write_parked(manifest.key)
        elif self._kept is not None:
            names = list(self._context.held(manifest))
            for name in names:
                if (chunk := self._context.store.get(name)) is not None:
                    await self._encoder.frame(name, chunk)
            on_disk = await self._context.tiers.persist(names)
            if not (on_disk and await self._kept.flush()):
                raise SessionError(
                    507, "the session does not fit on the disk: it is in memory only"
                )

    def _check_replica(self, manifest: Manifest) -> None:
        """Raises SessionError where the session lives here, and is as far or further."""
        present = self._context.sessions.get(manifest.key)
        if present is not None and not present.replica_of and present.turns >= manifest.turns:
            raise SessionError(409, "the session lives here, and is as far as the copy would be")

    async def copy(self, key: SessionKey, to: str) -> Transfer:
        """Let the peer `to` ("HOST:PORT") fetch the session from here."""
        return await self._offer(key, to, releases=False)

    async def _offer(self, key: SessionKey, to: str, *, releases: bool) -> Transfer:
        manifest = self.get(key)
        if manifest.parked:
            await self.wake(key)
        self.sizes(self.get(key))
        try:
            asked = wire.SessionPull(self._context.agent_id, releases)
            return await self._peer_named(to).pull(key, asked)
        except PeerFailure as failure:
            raise SessionError(502, str(failure)) from failure

    async def move(self, key: SessionKey, to: str) -> Transfer:
        """Copy, then release here. What was used meanwhile is copied again first."""
        total = Transfer(0, 0, 0, 0)
        for _ in range(MOVE_ROUNDS):
            before = self.get(key)
            report = await self._offer(key, to, releases=True)
            total.num_chunks = report.num_chunks
            total.num_sent += report.num_sent
            total.raw_bytes += report.raw_bytes
            total.wire_bytes += report.wire_bytes
            present = self.get(key)
            if present.turns == before.turns and present.chains == before.chains:
                self._release(present)
                return total
        raise SessionError(409, "the session is in use: it was copied, and stays here too")

    async def drain(self) -> AsyncIterator[DrainStep]:
        """Move every session to the peers in turn, one after the other; copies of what lives at a
        peer that is there stay."""
        keys = [
            manifest.key
            for manifest in self._context.sessions
            if not self._peers.is_there(manifest.replica_of)
        ]
        targets = [peer.name for peer in self._peers]
        if not targets:
            raise SessionError(409, "there are no peers to move sessions to")
        for done, key in enumerate(keys, start=1):
            step = DrainStep(key.tenant, key.session_id, done, len(keys))
            for offset in range(len(targets)):
                to = targets[(done + offset) % len(targets)]
                try:
                    await self.move(key, to)
                except SessionError as error:
                    step.error = str(error)
                else:
                    step.to, step.error = to, ""
                    break
            yield step

    # ---- our own ----------------------------------------------------------------------------

    def _lock(self, key: SessionKey) -> asyncio.Lock:
        """One of the long operations at a time for a session; forgotten when nobody uses it."""
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        return lock

    def _peer_named(self, name: str) -> Peer:
        for peer in self._peers:
            if peer.name == name:
                return peer
        known = ", ".join(peer.name for peer in self._peers) or "none"
        raise SessionError(404, f"{name} is not one of this agent's peers ({known})")

    async def _peer_with_id(self, agent_id: str) -> Peer:
        known = [peer for peer in self._peers if peer.directory.agent_id == agent_id]
        if known and not known[0].is_down:
            return known[0]
        for peer in self._peers:
            try:
                if (await peer.hello()).agent_id == agent_id:
                    return peer
            except PeerFailure:
                continue
        raise SessionError(403, f"agent {agent_id} is not one of this agent's peers")
