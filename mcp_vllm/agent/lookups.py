"""Answers one engine's lookups: at once from what is here and what peers have announced; only what
that leaves open is asked for, of peers without a directory and of the shared store.

Requests come by the hundred and wait for this, so the common way makes no task and few objects.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass

from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.load_decisions import LoadDecisions
from mcp_vllm.agent.peer import Peer
from mcp_vllm.agent.peers import Holders, Peers
from mcp_vllm.agent.reader import Reader
from mcp_vllm.codec.loss import EXACT
from mcp_vllm.link.protocol import Found, GroupLayout, Lookup, group_index
from mcp_vllm.session.fingerprint import Fingerprint
from mcp_vllm.session.manifest import SessionKey

# The agent answers a lookup before the engine stops waiting for it.
LOOKUP_SHARE = 0.8


@dataclass(slots=True)
class EngineRequest:
    """`lossy` names the tiers that it accepts; `loss` is the worst that it was given. `decided`:
    its whole context was looked up, and judged. `since_s`: when it came (`time.monotonic`)."""

    tenant: str
    session: SessionKey | None
    holders: Holders
    lossy: tuple[str, ...]
    since_s: float
    loss: str = EXACT
    decided: bool = False


@dataclass(slots=True)
class Search:
    """A lookup that is being answered.

    Attributes:
        present: a flag a key, of what was found so far; `absent`: the other keys.
        to_ask: peers that have to be asked for those.
    """

    message: Lookup
    request: EngineRequest | None
    reader: Reader
    present: bytearray
    absent: Sequence[bytes]
    to_ask: Sequence[Peer]
    begun_s: float


class Lookups:
    """One per engine that is connected; owned by the agent's event loop."""

    def __init__(
        self,
        context: AgentContext,
        peers: Peers,
        fingerprint: Fingerprint,
        groups: Sequence[GroupLayout],
        decisions: LoadDecisions,
    ) -> None:
        self._context = context
        self._peers = peers
        self._fingerprint = fingerprint
        self._namespace = fingerprint.digest
        self._sizes = [group.raw_bytes for group in groups]
        self._decisions = decisions
        found = context.metrics.lookup_keys.labels
        self._in_store, self._at_peers = found("store"), found("peer")
        self._shared, self._misses = found("shared"), found("miss")

    def begin(self, message: Lookup, request: EngineRequest | None) -> Search:
        """What is known without asking anybody."""
        begun_s = time.perf_counter()
        reader = self._context.reader(message.tenant, request.lossy if request else ())
        present = self._context.readable_flags(reader, self._namespace, message.keys)
        absent = [key for key, has in zip(message.keys, present, strict=True) if not has]
        self._in_store.inc(len(present) - len(absent))
        search = Search(message, request, reader, present, absent, (), begun_s)
        if request is not None:
            request.decided |= message.whole
            if absent and self._peers:
                raw_bytes = self._raw_bytes(absent)
                holders, search.to_ask = self._peers.known(
                    self._fingerprint, absent, reader, raw_bytes
                )
                self._found_at_peers(search, holders)
        return search

    def must_ask(self, search: Search) -> bool:
        """Whether somebody has to be asked for what is still absent."""
        if search.request is None or not search.absent:
            return False
        return bool(search.to_ask) or self._context.tiers.shared is not None

    async def ask(self, search: Search) -> None:
        """Ask, within the lookup's deadline."""
        context, loop = self._context, asyncio.get_running_loop()
        until_s = loop.time() + LOOKUP_SHARE * context.config.agent.lookup_ms / 1000
        if search.to_ask:
            holders = await self._peers.ask(
                search.to_ask,
                self._fingerprint,
                search.absent,
                search.reader,
                until_s - loop.time(),
                self._raw_bytes(search.absent),
            )
            self._found_at_peers(search, holders)
        if search.absent and context.tiers.shared is not None:
            reader, namespace = search.reader, self._namespace
            names = [name for key in search.absent for name in reader.names(namespace, key)]
            await context.tiers.locate(names, until_s - loop.time())
            flags = context.readable_flags(reader, namespace, search.absent)
            there = {key for key, has in zip(search.absent, flags, strict=True) if has}
            self._shared.inc(len(there))
            self._note(search, there)

    def answer(self, search: Search) -> Found:
        """The answer, without what is computed sooner than it is loaded."""
        self._misses.inc(len(search.absent))
        message, request, present = search.message, search.request, search.present
        if request is not None:
            decision = self._decisions.decide(message, request.holders, search.reader)
            if decision is not None and decision.choice != "load":
                self._decisions.hide(message, decision, present)
        self._context.metrics.lookup_seconds.observe(time.perf_counter() - search.begun_s)
        return Found(message.lookup_id, bytes(present))

    def _found_at_peers(self, search: Search, holders: Holders) -> None:
        assert search.request is not None
        self._at_peers.inc(len(holders))
        if holders:
            search.request.holders.update(holders)
            self._note(search, holders.keys())

    def _note(self, search: Search, found: Set[bytes]) -> None:
        for index, key in enumerate(search.message.keys):
            if key in found:
                search.present[index] = 1
        search.absent = [key for key in search.absent if key not in found]

    def _raw_bytes(self, keys: Sequence[bytes]) -> int:
        sizes = self._sizes
        return sum([sizes[group_index(key)] for key in keys])
