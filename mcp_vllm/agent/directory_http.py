"""Serves this agent's directory to those who follow it: `POST /v1/directory`."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web

from mcp_vllm.agent import directory_wire, wire
from mcp_vllm.agent.announcer import Announcer
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.streaming import write

# Each of them keeps a connection.
MAX_FOLLOWERS = 256


class DirectoryHttp:
    """Owned by the agent's event loop."""

    def __init__(self, context: AgentContext) -> None:
        self._announcer = Announcer(context)
        self._announcer.start()

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/directory", self._follow)]

    async def end(self, app: web.Application) -> None:
        """No stream outlives the agent."""
        self._announcer.close()

    async def _follow(self, request: web.Request) -> web.StreamResponse:
        asked = wire.decode(directory_wire.Follow, await request.read())
        wire.check_version(asked.version)
        if self._announcer.num_followers >= MAX_FOLLOWERS:
            return web.Response(status=503, text="too many agents follow this one\n")
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):  # they come and go
            await self._tell(response, asked)
        return response

    async def _tell(self, response: web.StreamResponse, asked: directory_wire.Follow) -> None:
        until_s = asyncio.get_running_loop().time() + directory_wire.STREAM_S
        async with contextlib.aclosing(self._announcer.stream(asked)) as messages:
            async for message in messages:
                await write(response, message)
                if asyncio.get_running_loop().time() > until_s:
                    break  # whoever follows comes back, with credentials of then
        await response.write_eof()
