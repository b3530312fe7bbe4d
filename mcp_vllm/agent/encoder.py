"""Turns raw chunks into frames when it costs nobody anything.

A chunk is taken over raw, because a copy is cheap and an engine at work needs the cores. It is
encoded when a peer asks for it, when the engines have been idle for a moment, or when the raw
chunks fill their share of the budget.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import replace

from mcp_vllm.agent.context import AgentContext
from mcp_vllm.codec import Codec, decode_frame_into, encode_frame
from mcp_vllm.codec.loss import EXACT
from mcp_vllm.security.seals import is_sealed
from mcp_vllm.store.ram import Chunk, ChunkKey

logger = logging.getLogger(__name__)

IDLE_S = 0.05
RAW_SHARE = 0.25


class Encoder:
    """One per agent; `frame` for those who need one now, `run` for the background."""

    def __init__(self, context: AgentContext) -> None:
        self._context = context
        self._in_flight: dict[ChunkKey, asyncio.Task[bytes]] = {}
        self._work = asyncio.Event()

    def notify(self) -> None:
        """Raw chunks were added to the store."""
        self._work.set()

    async def frame(self, name: ChunkKey, chunk: Chunk) -> bytes:
        """The chunk's frame, encoded now if need be; two callers share one encoding."""
        if chunk.frame is not None:
            return await self._sealed(name, chunk, chunk.frame)
        task = self._in_flight.get(name)
        if task is None:
            task = asyncio.create_task(self._encode(name, chunk))
            self._in_flight[name] = task
            task.add_done_callback(lambda _: self._in_flight.pop(name, None))
        return await asyncio.shield(task)

    async def frame_for(self, name: ChunkKey, chunk: Chunk, tenant: str) -> bytes:
        """The chunk's frame as that tenant's, who may not be its own.

        Raises:
            SealError: it is sealed for another, with a key that is not here.
        """
        frame = await self.frame(name, chunk)
        if name.tenant == tenant:
            return frame
        seals, loss = self._context.seals, chunk.loss
        return await self._context.in_pool(
            seals.reseal, frame, name.namespace, name.tenant, tenant, loss
        )

    async def frame_as(
        self, name: ChunkKey, chunk: Chunk, codec_name: str, calibration_id: bytes
    ) -> bytes:
        """A frame of the chunk by that codec, made for this caller; as stored where we lack it.

        What has a loss stays as it is: a second one would add to it.
        """
        codec = self._context.codecs.get(codec_name, name.namespace, calibration_id)
        is_stored = codec_name == self._context.config.codec.name
        can_change = self._context.seals.opens(name.tenant, chunk.frame)
        is_lossy_twice = codec is not None and not (codec.lossless or chunk.loss == EXACT)
        if codec is None or is_stored or is_lossy_twice or not can_change:
            return await self.frame(name, chunk)
        return await self._context.in_pool(self._encode_as, name, chunk, codec)

    async def run(self) -> None:
        """Encode in the background until cancelled."""
        store = self._context.store
        while True:
            waiting = store.next_raw()
            if waiting is None:
                self._work.clear()
                await self._work.wait()
            elif self._may_encode():
                await self._encode_quietly(*waiting)
            else:
                await self._wait_for_idle()

    async def _encode_quietly(self, name: ChunkKey, chunk: Chunk) -> None:
        """Encode; a chunk that cannot be is dropped, or it would be tried for ever."""
        try:
            await self.frame(name, chunk)
        except Exception as error:
            logger.error("chunk %s cannot be encoded and was dropped: %r", name.key.hex(), error)
            self._context.store.discard(name)

    def _may_encode(self) -> bool:
        size = self._context.store.size()
        crowded = size.raw_held_bytes > RAW_SHARE * size.budget_bytes
        return crowded or self._context.activity.idle_for_s() >= IDLE_S

    async def _wait_for_idle(self) -> None:
        activity = self._context.activity
        activity.changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(activity.changed.wait(), IDLE_S)

    async def _encode(self, name: ChunkKey, chunk: Chunk) -> bytes:
        context = self._context
        frame = await context.in_pool(self._encode_now, name, chunk)
        if chunk.frame is not None:
            return chunk.frame
        context.metrics.encoded_raw_bytes.inc(chunk.raw_bytes)
        context.metrics.encoded_frame_bytes.inc(len(frame))
        context.store.set_frame(name, chunk, frame)
        return frame

    def _encode_now(self, name: ChunkKey, chunk: Chunk) -> bytes:
        """Runs in the pool."""
        raw = chunk.raw
        assert raw is not None
        frame = encode_frame(name.key, raw.data, chunk.layout, self._context.codecs.stored)
        return self._seal(name, chunk, frame)

    def _encode_as(self, name: ChunkKey, chunk: Chunk, codec: Codec) -> bytes:
        """Runs in the pool: the chunk by `codec`, whatever form it is held in."""
        coding = self._context.codecs.engine(name.namespace)
        raw, frame, kv = chunk.raw, chunk.frame, coding.kv_of(name.key)
        layout = replace(chunk.layout, kv=kv)
        if raw is not None:
            return self._seal(name, chunk, encode_frame(name.key, raw.data, layout, codec))
        assert frame is not None
        opened = self._context.seals.open(frame, name.namespace, name.tenant)
        decoded = memoryview(bytearray(chunk.raw_bytes))
        decode_frame_into(opened, decoded, key=name.key, kv=kv, calibration=coding.calibration)
        return self._seal(name, chunk, encode_frame(name.key, decoded, layout, codec))

    async def _sealed(self, name: ChunkKey, chunk: Chunk, frame: bytes) -> bytes:
        """A stored frame as it may leave: one from before its tenant had a key is sealed now."""
        if is_sealed(frame) or not self._context.seals.key_ids(name.tenant):
            return frame
        return await self._context.in_pool(self._seal, name, chunk, frame)

    def _seal(self, name: ChunkKey, chunk: Chunk, frame: bytes) -> bytes:
        return self._context.seals.seal(frame, name.namespace, name.tenant, chunk.loss)
