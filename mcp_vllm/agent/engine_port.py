"""The agent's end of the link to one engine (protocol: `mcp_vllm.link.protocol`)."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import numpy as np

from mcp_vllm.agent import adoption
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.encoder import Encoder
from mcp_vllm.agent.inventory import InventoryFeed
from mcp_vllm.agent.landing import LandingSlots
from mcp_vllm.agent.load import LoadJob
from mcp_vllm.agent.load_decisions import LoadDecisions
from mcp_vllm.agent.lookups import EngineRequest, Lookups, Search
from mcp_vllm.agent.peers import Peers
from mcp_vllm.agent.reader import Reader
from mcp_vllm.agent.turn import Turn
from mcp_vllm.codec.loss import rank, worst
from mcp_vllm.errors import McpError
from mcp_vllm.link import protocol
from mcp_vllm.link.protocol import LENGTH, LinkError, group_index
from mcp_vllm.link.shared_memory import (
    MappedRows,
    check_same_user,
    map_rows,
    receive_with_fd,
    reopen_read_only,
    send_with_fd,
)
from mcp_vllm.link.spans import check_spans, gather
from mcp_vllm.session.fingerprint import MAX_FIELDS, MAX_VALUE_CHARS, Fingerprint
from mcp_vllm.session.manifest import SessionKey
from mcp_vllm.store.ram import Chunk, ChunkKey

logger = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
# Of what an engine sends, read at once.
READ_BYTES = 256 << 10
# After so many answers they are sent.
ANSWERS_AT_ONCE = 16
# Of a chunk in its chain.
MAX_POSITION = 1 << 20


def accept_engine(sock: socket.socket, context: AgentContext) -> EnginePort:
    """Shake hands with a newly connected engine. Blocking, bounded; runs in a thread.

    Raises:
        McpError or OSError: it is no engine of ours; it has been told why where possible.
    """
    check_same_user(sock)
    body, fd = receive_with_fd(sock, HANDSHAKE_S)
    sock.settimeout(HANDSHAKE_S)
    try:
        hello = protocol.unpack_engine(body)
        if not isinstance(hello, protocol.Hello) or fd is None:
            raise LinkError("an engine must start with Hello and its host chunks")
        try:
            _check_hello(hello)
            host = map_rows(fd, hello.num_chunks, hello.chunk_bytes, writable=False)
        except (ValueError, OSError, McpError) as error:
            send_with_fd(sock, protocol.pack(protocol.Refused(str(error))), None)
            raise LinkError(f"engine {hello.engine_id} refused: {error}") from error
    finally:
        if fd is not None:
            os.close(fd)
    slot_bytes = max(group.raw_bytes for group in hello.groups)
    slots = LandingSlots(slot_bytes, context.config.agent.landing_bytes)
    try:
        _welcome(sock, context, slots)
    except BaseException:
        slots.close()
        host.close()
        raise
    sock.setblocking(False)
    return EnginePort(hello, host, slots)


def _welcome(sock: socket.socket, context: AgentContext, slots: LandingSlots) -> None:
    welcome = protocol.Welcome(
        agent_id=context.agent_id,
        slot_bytes=slots.slot_bytes,
        num_slots=slots.num_slots,
        lookup_ms=context.config.agent.lookup_ms,
        load_ms=context.config.agent.load_ms,
        asks_peers=context.config.seeks_elsewhere,
        wants_positions=bool(context.config.codec.lossy),
        shared_tenants=list(context.config.tenants.shared),
    )
    landing_fd = reopen_read_only(slots.fd)
    try:
        send_with_fd(sock, protocol.pack(welcome), landing_fd)
    finally:
        os.close(landing_fd)


def _check_hello(hello: protocol.Hello) -> None:
    if hello.protocol != protocol.PROTOCOL_VERSION:
        raise LinkError(
            f"this agent speaks protocol {protocol.PROTOCOL_VERSION}, the engine "
            f"{hello.protocol}: install the same mcp-vllm on both"
        )
    if not hello.groups or len(hello.fingerprint) > MAX_FIELDS:
        raise LinkError("an engine needs at least one KV cache group and a sane fingerprint")
    for name, value in hello.fingerprint.items():
        if len(name) > MAX_VALUE_CHARS or len(value) > MAX_VALUE_CHARS:
            raise LinkError(f"fingerprint field {name[:64]!r} exceeds {MAX_VALUE_CHARS} characters")
    for group in hello.groups:
        check_spans(group.spans, hello.chunk_bytes)
        _ = group.codec_layout


class EnginePort:
    """One connected engine. Runs in the agent's event loop."""

    def __init__(self, hello: protocol.Hello, host: MappedRows, slots: LandingSlots) -> None:
        self.hello = hello
        self._host = host
        self._slots = slots
        self._requests: dict[str, EngineRequest] = {}
        self._uncommitted: dict[int, list[tuple[ChunkKey, Chunk]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._answers: list[bytes] = []

    async def serve(
        self, sock: socket.socket, context: AgentContext, peers: Peers, encoder: Encoder
    ) -> None:
        """Serve until the engine goes away or breaks the protocol."""
        self._context, self._peers, self._encoder = context, peers, encoder
        self._fingerprint = Fingerprint(self.hello.fingerprint)
        self._namespace = context.learn_engine(self._fingerprint, self.hello.groups)
        self._decisions = LoadDecisions(context, self._namespace, self.hello.groups)
        self._lookups = Lookups(
            context, peers, self._fingerprint, self.hello.groups, self._decisions
        )
        reader, self._writer = await asyncio.open_connection(sock=sock)
        feed = InventoryFeed(
            context.tiers,
            self._namespace,
            lambda inventory: self._writer.write(protocol.pack(inventory)),
            context.is_readable,
        )
        feed.start()
        context.seals.watchers.append(feed.refresh)
        context.metrics.engines.inc()
        logger.info(
            "engine %s (pid %d) connected: %d host chunks of %d bytes, namespace %s",
            self.hello.engine_id,
            self.hello.pid,
            self.hello.num_chunks,
            self.hello.chunk_bytes,
            self._namespace.hex(),
        )
        try:
            received = bytearray()
            while part := await reader.read(READ_BYTES):
                received += part
                await self._take(received)
            logger.info("engine %s disconnected", self.hello.engine_id)
        except ConnectionError:
            logger.info("engine %s disconnected", self.hello.engine_id)
        except (McpError, ValueError) as error:
            logger.error("engine %s broke the protocol: %s", self.hello.engine_id, error)
        except Exception:
            logger.exception("engine %s cannot be served any more", self.hello.engine_id)
        finally:
            feed.stop()
            context.seals.watchers.remove(feed.refresh)
            await self._close()
            context.metrics.engines.dec()

    async def _take(self, received: bytearray) -> None:
        """Handle the messages that are whole, and take them away; send what was answered."""
        at, turn = 0, Turn()
        while len(received) - at >= LENGTH.size:
            body = at + LENGTH.size
            end = body + protocol.body_size(received[at:body])
            if len(received) < end:
                break
            self._handle(protocol.unpack_engine(received[body:end]))
            at = end
            if len(self._answers) >= ANSWERS_AT_ONCE:
                self._send_answers()
            if turn.is_over:
                self._send_answers()
                await turn.pass_on()
        del received[:at]
        self._send_answers()
        await self._writer.drain()

    def _send_answers(self) -> None:
        if self._answers:
            self._writer.write(b"".join(self._answers))
            self._answers.clear()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for _ in self._requests:
            self._context.activity.end()
        self._requests.clear()
        self._writer.close()
        self._host.close()
        self._slots.close()

    def _handle(self, message: protocol.EngineMessage) -> None:
        match message:
            case protocol.Prepare():
                self._prepare(message)
            case protocol.Lookup():
                self._check_keys(message.keys)
                self._lookup(message)
            case protocol.Load():
                self._check_keys(message.keys)
                if message.ends and len(message.ends) != len(message.keys):
                    raise LinkError(f"{len(message.keys)} keys for {len(message.ends)} ends")
                self._start(self._load(message))
            case protocol.Release():
                self._slots.release(message.slots)
            case protocol.Store():
                self._check_keys(message.keys)
                self._check_chunk_ids(message)
                self._start(self._store(message))
            case protocol.Commit():
                self._commit(message.job_id)
            case protocol.Discard():
                self._uncommitted.pop(message.job_id, None)
            case protocol.Finish():
                self._finish(message)
            case protocol.Hello():
                raise LinkError("a second Hello")

    def _check_keys(self, keys: list[bytes]) -> None:
        num_groups = len(self.hello.groups)
        for key in keys:
            if not 4 < len(key) <= protocol.MAX_KEY_BYTES:
                raise LinkError(f"a key of {len(key)} bytes")
            if group_index(key) >= num_groups:
                raise LinkError(f"key {key.hex()} is of a group that the Hello did not name")

    def _check_chunk_ids(self, message: protocol.Store) -> None:
        if message.positions and len(message.positions) != len(message.keys):
            raise LinkError(f"{len(message.keys)} keys for {len(message.positions)} positions")
        if any(not 0 <= position < MAX_POSITION for position in message.positions):
            raise LinkError("a position that no context reaches")
        if len(message.chunk_ids) != len(message.keys):
            raise LinkError(f"{len(message.keys)} keys for {len(message.chunk_ids)} host chunks")
        for chunk_id in message.chunk_ids:
            if not 0 <= chunk_id < self.hello.num_chunks:
                raise LinkError(f"host chunk {chunk_id} does not exist")

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, ConnectionError):  # the engine went away: `serve` notes that
            logger.error("engine %s: %r", self.hello.engine_id, error, exc_info=error)

    async def _send(self, message: protocol.AgentMessage) -> None:
        self._writer.write(protocol.pack(message))
        await self._writer.drain()

    def _prepare(self, message: protocol.Prepare) -> None:
        session = message.session_id and SessionKey(message.tenant, message.session_id)
        if message.request_id not in self._requests:
            self._context.activity.begin()
        self._decisions.learn(message.prefill)
        lossy = self._context.config.codec.lossy_for(message.tenant, message.salted)
        request = EngineRequest(message.tenant, session or None, {}, lossy, time.monotonic())
        self._requests[message.request_id] = request

    def _reader(self, tenant: str, request: EngineRequest | None) -> Reader:
        return self._context.reader(tenant, request.lossy if request else ())

    def _lookup(self, message: protocol.Lookup) -> None:
        """Answer now where nobody has to be asked."""
        search = self._lookups.begin(message, self._requests.get(message.request_id))
        if self._lookups.must_ask(search):
            self._start(self._ask(search))
        else:
            self._answers.append(protocol.pack(self._lookups.answer(search)))

    async def _ask(self, search: Search) -> None:
        await self._lookups.ask(search)
        await self._send(self._lookups.answer(search))

    async def _load(self, message: protocol.Load) -> None:
        request = self._requests.get(message.request_id)
        holders = dict(request.holders) if request else {}
        reader = self._reader(message.tenant, request)
        decided = request is not None and request.decided
        job = LoadJob(
            context=self._context,
            slots=self._slots,
            namespace=self._namespace,
            job_id=message.job_id,
            keys=message.keys,
            ends=message.ends,
            groups=self.hello.groups,
            holders=holders,
            reader=reader,
            send=self._send,
            watch=self._decisions.watch(message, holders, reader, decided),
        )
        await job.run(self._context.config.agent.load_ms / 1000)
        if request is not None:
            request.loss = worst([request.loss, *job.losses.values()])
        self._encoder.notify()

    async def _store(self, message: protocol.Store) -> None:
        positions = message.positions or [0] * len(message.keys)
        reader = self._reader(message.tenant, None)
        new = [
            (reader.own(self._namespace, key), chunk_id, position)
            for key, chunk_id, position in zip(
                message.keys, message.chunk_ids, positions, strict=True
            )
            if self._is_news(reader, key, message.loss)
        ]
        copied = await self._context.in_pool(self._copy_chunks, new, message.loss)
        self._uncommitted[message.job_id] = copied
        await self._send(protocol.Stored(message.job_id, sum(c.raw_bytes for _, c in copied)))

    def _is_news(self, reader: Reader, key: bytes, loss: str) -> bool:
        name = self._context.readable(reader, self._namespace, key)
        held = self._context.tiers.find(name) if name is not None else None
        return held is None or rank(held.loss) > rank(loss)

    def _copy_chunks(
        self, new: list[tuple[ChunkKey, int, int]], loss: str
    ) -> list[tuple[ChunkKey, Chunk]]:
        """Runs in the pool: copy the pinned host chunks."""
        copied = []
        for name, chunk_id, position in new:
            group = self.hello.groups[group_index(name.key)]
            raw = np.empty(group.raw_bytes, dtype=np.uint8)
            gather(self._host.rows[chunk_id], group.spans, raw)
            raw.flags.writeable = False
            layout = replace(group.codec_layout, position=position)
            chunk = Chunk(layout, group.raw_bytes, raw=raw, loss=loss)
            copied.append((name, chunk))
        return copied

    def _commit(self, job_id: int) -> None:
        chunks = self._uncommitted.pop(job_id, [])
        for name, chunk in reversed(chunks):
            if not self._context.store.put(name, chunk):
                continue
            self._context.metrics.stored_chunks.inc()
            self._context.metrics.stored_raw_bytes.inc(chunk.raw_bytes)
        self._encoder.notify()

    def _finish(self, message: protocol.Finish) -> None:
        self._decisions.learn(message.prefill)
        request = self._requests.pop(message.request_id, None)
        if request is None:
            return
        self._context.activity.end()
        reader = self._reader(request.tenant, request)
        sealed = adoption.use(
            self._context,
            reader,
            self._namespace,
            message.chains,
            message.output_tokens,
            request.since_s,
        )
        if sealed:
            self._start(adoption.seal_anew(self._context, reader, sealed))
        if request.session is not None and message.chains:
            manifest = self._context.sessions.record_turn(
                request.session,
                self._namespace,
                message.chains,
                message.num_tokens,
                time.time(),
                request.loss,
            )
            self._context.pins.grow(manifest)
