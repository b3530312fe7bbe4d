"""Serves `placements`, of sessions and of prompts."""

from __future__ import annotations

import uuid

from aiohttp import web

from mcp_vllm.agent.access import present_principal
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.peers import Peers
from mcp_vllm.agent.placements import PlacementsOf, announced
from mcp_vllm.agent.session_error import SessionError
from mcp_vllm.agent.sessions_http import json_answer, json_body, session_key
from mcp_vllm.link.protocol import MAX_KEY_BYTES
from mcp_vllm.session.api import ONE, PlacementRequest, Placements

# Of a prompt: 8,192 keys in hexadecimal.
MAX_BODY_BYTES = 2 << 20


class PlacementsHttp:
    """The routes. Owned by the agent's event loop."""

    def __init__(self, context: AgentContext, peers: Peers) -> None:
        self._context = context
        self._peers = peers

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get(f"{ONE}/placements", self._of_session),
            web.post("/v1/placements", self._of_prompt),
        ]

    async def _of_session(self, request: web.Request) -> web.Response:
        key = session_key(request)
        manifest = self._context.sessions.get(key)
        if manifest is not None and not manifest.parked:
            placements = self._those(key.tenant, manifest.namespace)
            found = placements.of(manifest.chunk_keys(), manifest.num_tokens)
        else:
            found = announced(self._context, self._peers, key)
            if not found:
                raise SessionError(404, "no such session")
        return json_answer(Placements(found))

    async def _of_prompt(self, request: web.Request) -> web.Response:
        asked = await json_body(request, PlacementRequest, MAX_BODY_BYTES)
        try:
            namespace = bytes.fromhex(asked.namespace)
            keys = list(dict.fromkeys(map(bytes.fromhex, asked.keys)))
        except ValueError as error:
            raise SessionError(400, f"PlacementRequest: {error}") from error
        if any(not 4 < len(key) <= MAX_KEY_BYTES for key in keys):
            raise SessionError(400, "PlacementRequest: a key of impossible length")
        # Another tenant's is answered like one that has nothing.
        tenant = asked.tenant if present_principal().sees(asked.tenant) else uuid.uuid4().hex
        found = self._those(tenant, namespace).of(keys, asked.num_tokens)
        return json_answer(Placements(found))

    def _those(self, tenant: str, namespace: bytes) -> PlacementsOf:
        return PlacementsOf(self._context, self._peers, tenant, namespace)
