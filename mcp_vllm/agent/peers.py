"""All peers together: who is one, and who has which keys, in time for a request to use it.

A peer whose directory is known answers here and at once; the others are asked over the network.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence

import aiohttp

from mcp_vllm.agent.chunk_set import hash_as
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.directory_link import DirectoryLink, Pace
from mcp_vllm.agent.directory_view import DirectoryView
from mcp_vllm.agent.directory_wire import SessionState, session_hash
from mcp_vllm.agent.nearest import nearest_first
from mcp_vllm.agent.peer import Following, Peer, PeerFailure
from mcp_vllm.agent.peer_http import Member
from mcp_vllm.agent.reader import Reader
from mcp_vllm.agent.security import AgentSecurity
from mcp_vllm.session.fingerprint import Fingerprint
from mcp_vllm.session.manifest import SessionKey

logger = logging.getLogger(__name__)

MAX_PEERS = 256
# Of a directory's memory, an entry takes that: its nine bytes twice, while changes are merged.
ENTRY_BYTES = 18

Holders = dict[bytes, list[Peer]]


# What may wait to be read from a connection, at most twice that: with aiohttp's 64 KiB reading
# stops and starts several times a frame.
READ_BYTES = 1 << 20


class Peers:
    """The peers of one agent. Owned by its event loop."""

    def __init__(self, context: AgentContext, security: AgentSecurity) -> None:
        # No limit of all together: every peer's directory holds a connection.
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=32, keepalive_timeout=60)
        self._http = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=READ_BYTES,
        )
        self._context = context
        self._security = security
        self._pace = Pace()
        self._by_directory = context.metrics.peer_lookups.labels("directory")
        self._members: dict[str, dict[Member, None]] = {}
        self._peers: dict[Member, Peer] = {}
        self._links: dict[Member, asyncio.Task[None]] = {}

    def __bool__(self) -> bool:
        """Whether there may be any, this agent's own addresses among them."""
        return bool(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        """Each agent once, whatever addresses lead to it, and never this one."""
        seen = {self._context.agent_id}
        for peer in sorted(self._peers.values(), key=lambda peer: peer.is_down):
            agent_id = peer.directory.agent_id
            if agent_id not in seen:
                yield peer
            if agent_id:
                seen.add(agent_id)

    def set_members(self, source: str, members: Iterable[Member]) -> None:
        """These are the members that `source` knows of: they join now, others of it leave."""
        self._members[source] = dict.fromkeys(members)
        wanted = dict.fromkeys(each for known in self._members.values() for each in known)
        if len(wanted) > MAX_PEERS:
            logger.warning("%d peers are known, %d are used", len(wanted), MAX_PEERS)
            wanted = dict.fromkeys(list(wanted)[:MAX_PEERS])
        for member in self._peers.keys() - wanted.keys():
            self._leave(member)
        for member in wanted:
            if member not in self._peers:
                self._join(member)

    def known(
        self, fingerprint: Fingerprint, keys: Sequence[bytes], reader: Reader, raw_bytes: int
    ) -> tuple[Holders, Sequence[Peer]]:
        """Which peers have which of `keys`, as their directories say: the nearest first, for chunks
        of `raw_bytes` together. And the peers that have none, to be asked for what is left.

        What `reader` could not use does not count.
        """
        holders: Holders = {}
        peers = [peer for peer in self if not peer.is_down]
        known = [peer for peer in peers if peer.following is Following.SYNCED]
        if known:
            self._by_directory.inc(len(known))
            hashes = hash_as(reader.tenants, keys)
            for peer in known:
                for index in peer.find(fingerprint, hashes, reader):
                    holders.setdefault(keys[index], []).append(peer)
            nearest_first(holders, raw_bytes)
        return holders, [peer for peer in peers if peer.following is not Following.SYNCED]

    def is_there(self, agent_id: str) -> bool:
        """Whether a peer of that id is known, and not down."""
        return any(peer.directory.agent_id == agent_id and not peer.is_down for peer in self)

    def holders_of(self, key: SessionKey) -> list[tuple[Peer, SessionState]]:
        """The peers that say they have the session, and how far: the furthest first, of those the
        nearest. Answered from their directories; nobody is asked."""
        name = session_hash(key)
        known = [
            (peer, state)
            for peer in self
            if not peer.is_down and (state := peer.directory.session(name)) is not None
        ]
        known.sort(key=lambda each: (-each[1].turns, each[0].plan.meter.expected.latency_s))
        return known

    async def close(self) -> None:
        links = list(self._links.values())
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)
        await self._http.close()

    async def ask(
        self,
        peers: Sequence[Peer],
        fingerprint: Fingerprint,
        keys: Sequence[bytes],
        reader: Reader,
        deadline_s: float,
        raw_bytes: int,
    ) -> Holders:
        """Which of these peers have which of `keys`, as they answer in time: as `known`. Returns
        early once one of them has everything."""
        peers = [peer for peer in peers if peer.breaker.allow()]
        holders: Holders = {}
        self._context.metrics.peer_lookups.labels("network").inc(len(peers))
        asked = {
            asyncio.create_task(peer.lookup(fingerprint, keys, reader)): peer for peer in peers
        }
        pending: set[asyncio.Task[bytes]] = set(asked)
        until = asyncio.get_running_loop().time() + deadline_s
        complete = False
        try:
            while pending and not complete:
                left_s = until - asyncio.get_running_loop().time()
                done, pending = await asyncio.wait(
                    pending, timeout=max(0, left_s), return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                for task in done:
                    present = _flags(task)
                    for key, has in zip(keys, present, strict=False):
                        if has:
                            holders.setdefault(key, []).append(asked[task])
                    complete |= bool(present) and all(present)
        finally:
            self._abandon(pending, until)
        nearest_first(holders, raw_bytes)
        return holders

    def _join(self, member: Member) -> None:
        context = self._context
        stall_s = context.config.agent.stall_ms / 1000
        directory = DirectoryView(self._max_entries)
        peer = Peer(member, self._http, context.metrics, stall_s, self._security, directory)
        link = DirectoryLink(peer, context.agent_id, context.metrics, self._pace)
        self._peers[member] = peer
        self._links[member] = asyncio.create_task(link.run())

    def _leave(self, member: Member) -> None:
        """Loads under way still finish with it."""
        self._links.pop(member).cancel()
        peer = self._peers.pop(member)
        peer.following = Following.DOWN
        peer.directory.forget()
        self._context.metrics.forget_peer(peer.name)

    def _max_entries(self) -> int:
        """Of each peer: none can take the others' room."""
        share = self._context.config.agent.directory_bytes / max(1, len(self._peers))
        return int(share / ENTRY_BYTES)

    def _abandon(self, pending: set[asyncio.Task[bytes]], until: float) -> None:
        """Let unanswered lookups run to the deadline in the background, then give them up."""
        for task in pending:
            task.add_done_callback(_flags)
            left_s = max(0.0, until - asyncio.get_running_loop().time())
            asyncio.get_running_loop().call_later(left_s, task.cancel)


def _flags(task: asyncio.Task[bytes]) -> bytes:
    """The task's flags; nothing when it failed (which the peer has counted already)."""
    if task.cancelled():
        return b""
    error = task.exception()
    if error is None:
        return task.result()
    if not isinstance(error, PeerFailure):
        logger.error("a lookup failed", exc_info=error)
    return b""
