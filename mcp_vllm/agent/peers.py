"""All configured peers together: who has which keys, in time for a request to use it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence

import aiohttp

from mcp_vllm.agent.peer import Peer, PeerFailure
from mcp_vllm.agent.reader import Reader
from mcp_vllm.agent.security import AgentSecurity
from mcp_vllm.session.fingerprint import Fingerprint
from mcp_vllm.telemetry.agent_metrics import AgentMetrics

logger = logging.getLogger(__name__)


class Peers:
    """The configured peers. One per agent, owned by its event loop."""

    def __init__(
        self, names: Sequence[str], metrics: AgentMetrics, stall_s: float, security: AgentSecurity
    ) -> None:
        connector = aiohttp.TCPConnector(limit_per_host=32, keepalive_timeout=60)
        self._http = aiohttp.ClientSession(
            connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        )
        self._peers = [Peer(name, self._http, metrics, stall_s, security) for name in names]

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers)

    async def locate(
        self,
        fingerprint: Fingerprint,
        keys: Sequence[bytes],
        reader: Reader,
        deadline_s: float,
    ) -> dict[bytes, list[Peer]]:
        """Which peers have which of `keys`, as far as they answer within `deadline_s`.

        What `reader` could not use does not count. Returns early once one peer has everything.
        """
        holders: dict[bytes, list[Peer]] = {}
        asked = {
            asyncio.create_task(peer.lookup(fingerprint, keys, reader)): peer
            for peer in self._peers
            if peer.breaker.allow()
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
        return holders

    async def close(self) -> None:
        await self._http.close()

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
