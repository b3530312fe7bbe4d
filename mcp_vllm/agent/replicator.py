"""Keeps copies of this agent's sessions at peers, so that its loss takes no context with it.

After each turn the session waits in a bounded queue; one task takes it from there and lets peers
fetch what they lack, at a limited rate, the next peer where one fails. Who has a copy is what the
peers' directories say, so a copy that was evicted, or whose holder is gone, is made anew: all
sessions are looked through every `SWEEP_S`. Nothing here is waited for by a request. Owned by the
agent's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import numpy as np
import xxhash

from mcp_vllm.agent import wire
from mcp_vllm.agent.chunk_set import Hashes, hash_keys
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.directory_wire import session_hash
from mcp_vllm.agent.peer import Following, Peer, PeerFailure
from mcp_vllm.agent.peers import Peers
from mcp_vllm.agent.turn import Turn
from mcp_vllm.session.api import Transfer
from mcp_vllm.session.manifest import Manifest, SessionKey

logger = logging.getLogger(__name__)

SWEEP_S = 10.0
# How often a copy under way looks whether its peer is still there.
ALIVE_S = 0.5


class Replicator:
    """One per agent; `run` does the work."""

    def __init__(self, context: AgentContext, peers: Peers) -> None:
        self._context = context
        self._config = context.config.replication
        self._peers = peers
        self._due: dict[SessionKey, None] = {}
        self._work = asyncio.Event()
        self._is_failing = False

    async def run(self) -> None:
        """For ever; returns at once where no copies are wanted."""
        if not self._config.replicas:
            return
        self._context.sessions.watchers.append(self._changed)
        sweep = asyncio.create_task(self._sweep_for_ever())
        try:
            while True:
                while self._due:
                    key = next(iter(self._due))
                    del self._due[key]
                    await self._bring_up(key)
                    self._note_queue()
                self._work.clear()
                await self._work.wait()
        finally:
            sweep.cancel()
            self._context.sessions.watchers.remove(self._changed)

    # ---- what is to be done -----------------------------------------------------------------

    def _changed(self, key: SessionKey, manifest: Manifest | None) -> None:
        if manifest is None:
            self._queue(key)  # a name only, and nothing would make up for it
        elif self._is_ours(manifest):
            self._add(key)

    def _is_ours(self, manifest: Manifest) -> bool:
        """Whether its copies are our business: it lives here, or where it lived is lost."""
        home = manifest.replica_of
        return not manifest.parked and not (home and self._peers.is_there(home))

    def _add(self, key: SessionKey) -> None:
        if key not in self._due and len(self._due) >= self._config.queue:
            self._context.metrics.replications.labels("dropped").inc()
            return
        self._queue(key)

    def _queue(self, key: SessionKey) -> None:
        self._due[key] = None
        self._note_queue()
        self._work.set()

    def _note_queue(self) -> None:
        self._context.metrics.replication_queued.set(len(self._due))

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self._sweep()
            except Exception:
                logger.exception("looking for sessions without copies failed")

    async def _sweep(self) -> None:
        """Sessions that have too few copies wait to be copied again, as far as there is room."""
        short = 0
        keys = [manifest.key for manifest in self._context.sessions]
        turn = Turn()
        for key in keys:
            if turn.is_over:
                await turn.pass_on()
            manifest = self._context.sessions.get(key)
            if manifest is None or not self._is_ours(manifest):
                continue
            if len(self._holders(manifest)) < self._config.replicas:
                short += 1
                if len(self._due) < self._config.queue:
                    self._add(key)
        self._context.metrics.replication_short.set(short)

    # ---- doing it ---------------------------------------------------------------------------

    async def _bring_up(self, key: SessionKey) -> None:
        """Give the session the copies that it lacks; take back those of one that is gone."""
        try:
            manifest = self._context.sessions.get(key)
            if manifest is None:
                await self._take_back(key)
            elif self._is_ours(manifest):
                await self._copy(manifest)
        except Exception:
            logger.exception("copying a session to peers failed")

    async def _copy(self, manifest: Manifest) -> None:
        holders = self._holders(manifest)
        last = "there are too few peers"
        for peer in self._candidates(manifest.key):
            if len(holders) >= self._config.replicas:
                break
            if peer in holders:
                continue
            try:
                report = await self._pulled(peer, manifest.key)
            except PeerFailure as failure:
                self._context.metrics.replications.labels("failed").inc()
                last = str(failure)
                continue
            holders.append(peer)
            self._context.metrics.replications.labels("copied").inc()
            self._context.metrics.replicated_bytes.inc(report.wire_bytes)
        self._say(len(holders) < self._config.replicas, last)

    async def _pulled(self, peer: Peer, key: SessionKey) -> Transfer:
        """Let the peer fetch the session. Raises PeerFailure, also when the peer falls silent."""
        asked = wire.SessionPull(
            self._context.agent_id, replica=True, bytes_s=float(self._config.bytes_s)
        )
        pull = asyncio.create_task(peer.pull(key, asked))
        try:
            while not (await asyncio.wait({pull}, timeout=ALIVE_S))[0]:
                if peer.is_down:
                    raise PeerFailure("closed", f"peer {peer.name} is gone")
            return pull.result()
        finally:
            pull.cancel()
            await asyncio.gather(pull, return_exceptions=True)

    async def _take_back(self, key: SessionKey) -> None:
        # Whoever it was copied to just now may not have announced it yet.
        for peer in [each for each in self._peers if not each.is_down]:
            try:
                await peer.release(key, self._context.agent_id)
            except PeerFailure as failure:
                logger.debug("a copy was not released: %s", failure)

    def _say(self, failing: bool, why: str) -> None:
        if failing and not self._is_failing:
            logger.warning("sessions have fewer copies than replication.replicas: %s", why)
        elif self._is_failing and not failing:
            logger.info("sessions have their copies again")
        self._is_failing = failing

    # ---- who --------------------------------------------------------------------------------

    def _holders(self, manifest: Manifest) -> list[Peer]:
        """The peers that have the session as far as it is here, by their directories."""
        hashes = self._hashes(manifest)
        return [
            peer
            for peer, state in self._peers.holders_of(manifest.key)
            if state.turns >= manifest.turns and peer.directory.has_all(manifest.namespace, hashes)
        ]

    def _hashes(self, manifest: Manifest) -> Hashes:
        """Of the session's chunks that are here: those that a copy can have."""
        context = self._context
        keys: dict[str, list[bytes]] = {}
        for name in context.names_of(manifest):
            if name in context.tiers:
                keys.setdefault(name.tenant, []).append(name.key)
        hashed = [hash_keys(of_tenant, tenant) for tenant, of_tenant in keys.items()]
        return np.concatenate(hashed) if hashed else np.empty(0, dtype=np.uint64)

    def _candidates(self, key: SessionKey) -> Sequence[Peer]:
        """Peers to ask, in order: who has an older copy first, then by a hash of session and peer:
        the same ones each time, and others for other sessions."""
        name = session_hash(key)
        # Only who announces what it has can be told to have a copy.
        there = [
            peer
            for peer in self._peers
            if peer.following is Following.SYNCED and peer.breaker.is_closed
        ]

        def order(peer: Peer) -> tuple[bool, int]:
            which = f"{name} {peer.directory.agent_id or peer.name}".encode()
            return peer.directory.session(name) is None, xxhash.xxh3_64_intdigest(which)

        return sorted(there, key=order)
