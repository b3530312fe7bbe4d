"""Why blocks are kept, or are not: a session's, or those of one key."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import msgspec
from aiohttp import web

from mcp_vllm.agent.access import visible
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.session_error import SessionError
from mcp_vllm.agent.sessions import Sessions
from mcp_vllm.agent.sessions_http import checked_key
from mcp_vllm.link.protocol import MAX_KEY_BYTES
from mcp_vllm.session.api import BLOCK_CACHE, SESSION_CACHE
from mcp_vllm.session.cache_api import BlockView, CacheView, TierView
from mcp_vllm.store.ram import ChunkKey
from mcp_vllm.store.smart_cache import Explanation

# One answer; a session's first blocks, which all of it rests on.
MAX_BLOCKS = 1000
# Explained without a pause in between.
SLICE_BLOCKS = 50


class CacheHttp:
    """The routes. Owned by the agent's event loop."""

    def __init__(self, context: AgentContext, sessions: Sessions) -> None:
        self._context = context
        self._sessions = sessions

    def routes(self) -> list[web.RouteDef]:
        return [web.get(SESSION_CACHE, self._session), web.get(BLOCK_CACHE, self._block)]

    async def _session(self, request: web.Request) -> web.Response:
        named = request.match_info
        key = visible(checked_key(named["tenant"], named["session_id"]))
        names = self._context.names_of(self._sessions.get(key))
        return await self._answer(names)

    async def _block(self, request: web.Request) -> web.Response:
        # Who may see the tenant's sessions may see its blocks.
        asked = checked_key(request.match_info["tenant"], "(block)")
        is_seen = visible(asked) == asked
        try:
            key = bytes.fromhex(request.match_info["key"])
        except ValueError as error:
            raise SessionError(400, "a block's key is hexadecimal") from error
        if not 4 < len(key) <= MAX_KEY_BYTES:
            raise SessionError(400, f"a key of {len(key)} bytes")
        namespaces = {each.namespace for each in self._context.sessions}
        namespaces.update(self._context.fingerprints)
        names = [ChunkKey(each, key, asked.tenant) for each in sorted(namespaces)]
        return await self._answer(names if is_seen else [])

    async def _answer(self, names: Sequence[ChunkKey]) -> web.Response:
        """Of those that something is known of. Raises SessionError: 404, of none."""
        shown, num_more = names[:MAX_BLOCKS], max(0, len(names) - MAX_BLOCKS)
        memory = await self._in_memory(shown)
        disk = self._context.tiers.disk
        on_disk = await disk.explain(shown) if disk is not None else [None] * len(shown)
        blocks = [
            BlockView(name.namespace.hex(), name.key.hex(), name.tenant, _view(above), _view(below))
            for name, above, below in zip(shown, memory, on_disk, strict=True)
            if above is not None or below is not None
        ]
        if not blocks:
            raise SessionError(404, "nothing is known of it: never seen here, or long forgotten")
        body = msgspec.json.encode(CacheView(blocks, num_more))
        return web.Response(body=body, content_type="application/json")

    async def _in_memory(self, names: Sequence[ChunkKey]) -> list[Explanation | None]:
        found: list[Explanation | None] = []
        for start in range(0, len(names), SLICE_BLOCKS):
            part = names[start : start + SLICE_BLOCKS]
            found += [self._context.store.policy.explain(name) for name in part]
            await asyncio.sleep(0)
        return found


def _view(explanation: Explanation | None) -> TierView | None:
    return TierView(**dataclasses.asdict(explanation)) if explanation is not None else None
