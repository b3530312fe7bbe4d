"""The agent's HTTP server: blocks for peers, sessions and health for operators, metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from mcp_vllm import __version__
from mcp_vllm.agent import peer_report, wire
from mcp_vllm.agent.cache_http import CacheHttp
from mcp_vllm.agent.chains import by_group
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.directory_http import DirectoryHttp
from mcp_vllm.agent.encoder import Encoder
from mcp_vllm.agent.peers import Peers
from mcp_vllm.agent.placements_http import PlacementsHttp
from mcp_vllm.agent.quotas import QuotaReports
from mcp_vllm.agent.reader import Reader
from mcp_vllm.agent.sessions import Sessions
from mcp_vllm.agent.sessions_http import SessionsHttp, session_errors
from mcp_vllm.agent.streaming import write
from mcp_vllm.agent.wire import WireError
from mcp_vllm.codec.loss import rank
from mcp_vllm.store.ram import ChunkKey

logger = logging.getLogger(__name__)

# Frames encoded ahead of the one being sent, so that encoding and sending overlap.
ENCODE_AHEAD = 4
# Of a frame, at once.
SLICE_BYTES = 512 << 10


class _Place(NamedTuple):
    """Of a frame in an answer: the key's index, the rank of the loss, the tenant's index."""

    key_index: int
    loss_rank: int
    tenant_index: int


class HttpApi:
    """The routes. Owned by the agent's event loop.

    Args:
        is_guarded: whether requests must say who asks.
    """

    def __init__(
        self,
        context: AgentContext,
        encoder: Encoder,
        peers: Peers,
        sessions: Sessions,
        quotas: QuotaReports,
        is_guarded: bool,
    ) -> None:
        self._is_guarded = is_guarded
        self._quotas = quotas
        self._context = context
        self._peers = peers
        self._sessions = SessionsHttp(context, sessions)
        self._cache = CacheHttp(context, sessions)
        self._encoder = encoder
        self._directory = DirectoryHttp(context)
        self._placements = PlacementsHttp(context, peers)

    def application(self, guards: Sequence[Middleware]) -> web.Application:
        """The routes behind `guards`, the outermost first."""
        app = web.Application(
            client_max_size=wire.MAX_REQUEST_BYTES,
            middlewares=[*guards, _refuse_malformed, session_errors],
        )
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/metrics", self._metrics),
                web.get("/v1/hello", self._hello),
                web.get("/v1/peers", self._list_peers),
                web.post("/v1/blocks/lookup", self._lookup),
                web.post("/v1/blocks/fetch", self._fetch),
                *self._directory.routes(),
                *self._placements.routes(),
                *self._sessions.routes(),
                *self._cache.routes(),
            ]
        )
        app.on_shutdown.append(self._directory.end)
        return app

    async def _healthz(self, request: web.Request) -> web.Response:
        known = {
            "status": "ok",
            "version": __version__,
            "agent_id": self._context.agent_id,
        }
        if self._is_guarded:  # anybody may ask, and counts tell what others do
            return web.json_response(known)
        size = self._context.store.size()
        return web.json_response(
            known
            | {
                "engines": int(self._context.metrics.engines._value.get()),
                "busy_requests": self._context.activity.busy_requests,
                "chunks": size.num_chunks,
                "raw_chunks_bytes": size.raw_held_bytes,
                "held_bytes": size.held_bytes,
                "budget_bytes": size.budget_bytes,
                "disk": self._disk_health(),
                "shared": self._shared_health(),
            }
        )

    def _disk_health(self) -> dict[str, object]:
        disk = self._context.tiers.disk
        if disk is None:
            is_wanted = self._context.config.agent.disk.path is not None
            return {"status": "unusable" if is_wanted else "off"}
        size = disk.size()
        return {
            "status": "full" if size.is_full else "ok",
            "chunks": size.num_chunks,
            "held_bytes": size.file_bytes,
            "budget_bytes": size.budget_bytes,
        }

    def _shared_health(self) -> str:
        shared = self._context.tiers.shared
        if shared is None:
            return "off"
        return "ok" if shared.is_up else "down"

    async def _metrics(self, request: web.Request) -> web.Response:
        context, metrics = self._context, self._context.metrics
        size = context.store.size()
        metrics.chunks.set(size.num_chunks)
        metrics.held_bytes.set(size.held_bytes)
        metrics.evictions.set(context.store.evictions)
        metrics.sessions.set(len(context.sessions))
        for peer in self._peers:
            metrics.directory_chunks.labels(peer.name).set(peer.directory.num_chunks)
        if context.tiers.disk is not None:
            metrics.set_disk(context.tiers.disk)
        if context.tiers.shared is not None:
            metrics.set_shared(context.tiers.shared)
        self._quotas.refresh()
        return web.Response(body=metrics.render(), content_type="text/plain", charset="utf-8")

    async def _hello(self, request: web.Request) -> web.Response:
        hello = wire.PeerHello(wire.WIRE_VERSION, self._context.agent_id, self._fingerprints())
        return _packed(hello)

    async def _list_peers(self, request: web.Request) -> web.Response:
        body = msgspec.json.encode(peer_report.report(self._peers, self._context))
        return web.Response(body=body, content_type="application/json")

    async def _lookup(self, request: web.Request) -> web.Response:
        asked = wire.decode(wire.LookupRequest, await request.read())
        wire.check_keys(asked)
        wire.check_opens(asked)
        context = self._context
        reader = Reader(asked.tenants, asked.lossy, asked.opens)
        present = bytes(
            reader.usable(context.tiers, asked.namespace, key, context.sealed_by) is not None
            for key in asked.keys
        )
        if asked.namespace not in context.fingerprints and not any(present):
            return _packed(wire.LookupReply(b"", self._fingerprints()))
        reply = wire.LookupReply(
            present,
            stored_codec=context.config.codec.name,
            send_bytes_s=context.codecs.sending_speeds(asked.namespace),
            prefill=context.prefills.get(asked.namespace),
        )
        return _packed(reply)

    async def _fetch(self, request: web.Request) -> web.StreamResponse:
        asked = wire.decode(wire.FetchRequest, await request.read())
        wire.check_keys(asked)
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        reader = Reader(asked.tenants, asked.lossy)
        tiers = self._context.tiers
        names = [reader.held(tiers, asked.namespace, key) for key in asked.keys]
        try:
            await response.prepare(request)
            for chain in by_group(filter(None, names)):
                tiers.touch(chain)
            await self._send_frames(response, names, asked)
            await response.write(wire.FRAME_HEAD.pack(wire.END_INDEX, 0, 0, 0))
            await response.write_eof()
        except ConnectionError as error:  # peers give up loads that do not pay: no fault
            logger.debug("a transfer to %s was cut off: %s", request.remote, error)
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _send_frames(
        self,
        response: web.StreamResponse,
        names: Sequence[ChunkKey | None],
        asked: wire.FetchRequest,
    ) -> None:
        ahead: list[asyncio.Task[tuple[_Place, bytes] | None]] = []
        index = 0
        try:
            while index < len(names) or ahead:
                while index < len(names) and len(ahead) < ENCODE_AHEAD:
                    name = names[index]
                    if name is not None:
                        ahead.append(asyncio.create_task(self._frame(index, name, asked)))
                    index += 1
                if ahead:
                    placed = await ahead.pop(0)
                    if placed is not None:
                        await self._send_frame(response, *placed)
        finally:
            for task in ahead:
                task.cancel()

    async def _frame(
        self, index: int, name: ChunkKey, asked: wire.FetchRequest
    ) -> tuple[_Place, bytes] | None:
        """The frame as it was asked for; None: it is gone."""
        chunk = await self._context.tiers.get(name)
        if chunk is None:
            return None
        frame = await self._encoder.frame_as(name, chunk, asked.codec, asked.calibration_id)
        return _Place(index, rank(chunk.loss), asked.tenants.index(name.tenant)), frame

    async def _send_frame(self, response: web.StreamResponse, place: _Place, frame: bytes) -> None:
        # In one piece where it is small: every write wakes the receiver.
        body = memoryview(wire.FRAME_HEAD.pack(*place, len(frame)) + frame)
        for start in range(0, len(body), SLICE_BYTES):
            await write(response, body[start : start + SLICE_BYTES])
        self._context.metrics.wire_sent_bytes.inc(len(body))
        self._context.metrics.sent_chunks.inc()

    def _fingerprints(self) -> list[dict[str, str]]:
        known = list(self._context.fingerprints.values())
        return [dict(fingerprint.fields) for fingerprint in known[-wire.MAX_FINGERPRINTS :]]


@web.middleware
async def _refuse_malformed(request: web.Request, handler):  # type: ignore[no-untyped-def]
    try:
        return await handler(request)
    except WireError as error:
        status = 409 if error.cause == "version" else 400
        return web.Response(status=status, text=f"{error}\n")


def _packed(message: msgspec.Struct) -> web.Response:
    return web.Response(body=wire.encode(message), content_type="application/msgpack")
