"""Bringing whole sessions from a peer: what is missing here travels, resumed where it stopped."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence

from mcp_vllm.agent import wire
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.peer import FetchedFrame, Peer, PeerFailure, Wanted
from mcp_vllm.agent.received import check_received, check_sealed, keep_verified
from mcp_vllm.agent.transfer_plan import count_within
from mcp_vllm.codec import CodecError, FrameError
from mcp_vllm.codec.loss import is_acceptable
from mcp_vllm.errors import McpError
from mcp_vllm.session.api import Transfer
from mcp_vllm.session.manifest import Manifest
from mcp_vllm.store.ram import ChunkKey

ATTEMPTS = 4
FIRST_PAUSE_S = 0.2
# A transfer with a limited rate asks for what it may take in this time.
PACED_REQUEST_S = 0.5
# A chunk is at most this large; peers claim sizes before anything is read.
MAX_CHUNK_BYTES = 256 << 20


class TransferError(McpError):
    """A session did not come over whole."""


class SessionTransfer:
    """One session's way from `peer` to here.

    Args:
        sizes: raw bytes of each chunk of it that the peer has, by the peer's word.
        bytes_s: no faster than so many bytes a second, but for one request ahead; 0: any speed.
    """

    def __init__(
        self,
        context: AgentContext,
        peer: Peer,
        manifest: Manifest,
        sizes: Mapping[bytes, int],
        bytes_s: float = 0.0,
    ) -> None:
        self._bytes_s = bytes_s
        self._context = context
        self._peer = peer
        self._manifest = manifest
        self._sizes = sizes
        tenant = manifest.key.tenant
        self._lossy = context.config.codec.lossy_for(tenant, salted=False)
        self._reader = context.reader(tenant, self._lossy)
        self._report = Transfer(len(self._sizes), 0, 0, 0)

    async def run(self) -> Transfer:
        """Fetch what is missing until all is here.

        Raises:
            TransferError: it is not, after several attempts; what came stays.
        """
        self._check()
        self._begun_s = time.monotonic()
        pause_s = FIRST_PAUSE_S
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(pause_s)
                pause_s *= 2
            try:
                await self._fetch_missing()
            except PeerFailure as failure:
                last = str(failure)
            else:
                last = "chunks are gone there, or do not fit into the memory here"
            missing = self._missing()
            if not missing:
                return self._report
        raise TransferError(f"{len(missing)} of {len(self._sizes)} chunks did not arrive: {last}")

    def _check(self) -> None:
        if not is_acceptable(self._manifest.loss, self._lossy):
            raise TransferError(
                f"the session went through codec {self._manifest.loss}, which is not allowed here "
                "(codec.lossy)"
            )
        if any(not 0 < size <= MAX_CHUNK_BYTES for size in self._sizes.values()):
            raise TransferError("the peer claims chunks of impossible size")

    def _missing(self) -> list[bytes]:
        return [key for key in self._sizes if self._is_missing(key)]

    def _is_missing(self, key: bytes) -> bool:
        return self._reader.held(self._context.tiers, self._manifest.namespace, key) is None

    async def _fetch_missing(self) -> None:
        names = [self._name(key) for key in self._missing()]
        with self._context.flights.claim(names) as claimed:
            wanted = [name.key for name in claimed]
            while wanted:
                codec, count = self._next_request(wanted)
                asked, wanted = wanted[:count], wanted[count:]
                bounds = [self._sizes[key] + wire.FRAME_SLACK_BYTES for key in asked]
                coding = self._context.codecs.engine(self._manifest.namespace)
                how = Wanted(codec, self._reader, coding.calibration_id)
                frames = self._peer.fetch(self._manifest.namespace, asked, bounds, how)
                async with contextlib.aclosing(frames):
                    async for fetched in frames:
                        await self._keep(asked[fetched.index], fetched)
                self._peer.note_fetched()
                await self._keep_pace()
        for name in set(names) - set(claimed):
            await self._context.flights.wait(name)

    def _next_request(self, wanted: Sequence[bytes]) -> tuple[str, int]:
        context = self._context
        sizes = [self._sizes[key] for key in wanted]
        codec, count = self._peer.plan.next_request(
            sizes,
            context.codecs.acceptable(self._lossy),
            context.codecs.speeds(self._manifest.namespace),
            context.codec_threads,
        )
        if self._bytes_s:
            count = min(count, count_within(sizes, PACED_REQUEST_S * self._bytes_s))
        return codec, count

    async def _keep_pace(self) -> None:
        """Wait until what has come was not too fast."""
        if self._bytes_s:
            due_s = self._begun_s + self._report.wire_bytes / self._bytes_s
            await asyncio.sleep(due_s - time.monotonic())

    async def _keep(self, key: bytes, fetched: FetchedFrame) -> None:
        """Verify and store a frame. Raises PeerFailure when it is not what it should be."""
        size = self._sizes[key]
        try:
            name = ChunkKey(self._manifest.namespace, key, fetched.tenant)
            header, loss = check_received(fetched.frame, fetched.loss, size, self._lossy)
            check_sealed(self._context, name, fetched.frame)
            if header.raw_size != size:
                raise FrameError(f"frame holds {header.raw_size} raw bytes, not {size}")
            await keep_verified(self._context, name, fetched.frame, header, loss)
        except CodecError as error:
            self._peer.note_failure("malformed", str(error), fetching=True)
            raise PeerFailure("malformed", f"peer {self._peer.name}: {error}") from error
        self._report.num_sent += 1
        self._report.raw_bytes += size
        self._report.wire_bytes += len(fetched.frame)

    def _name(self, key: bytes) -> ChunkKey:
        return self._reader.own(self._manifest.namespace, key)
