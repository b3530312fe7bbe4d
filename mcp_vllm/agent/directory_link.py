"""Follows one peer's directory for as long as the peer is a member, and so knows whether it lives.

One task a peer, started by `peers`. A peer that says nothing for `SILENCE_S`, cuts the stream or
breaks the protocol is down at once: no request asks it until this link, which tries again by
itself with back-off, reaches it. All of it runs in the agent's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable

import aiohttp

from mcp_vllm.agent import directory_wire
from mcp_vllm.agent.directory_view import DirectoryGap, DirectoryTooLarge
from mcp_vllm.agent.directory_wire import SILENCE_S, Message, Start
from mcp_vllm.agent.peer import Following, Peer, PeerFailure
from mcp_vllm.agent.peer_http import FAULTS, check_status
from mcp_vllm.agent.wire import WireError
from mcp_vllm.telemetry.agent_metrics import AgentMetrics

logger = logging.getLogger(__name__)

# Silence is counted in slices: an event loop that was held up itself reads what came meanwhile.
SLICES = 5
# A message that began is complete within that time.
MESSAGE_S = 10.0
RETRY_MIN_S, RETRY_MAX_S = 0.1, 5.0
# A stream that lasted for so long was a good one: the next attempt comes soon.
STEADY_S = 10.0
# For a peer that has no directory for us, or that is this agent.
ASK_AGAIN_S = 60.0
PING_S = 5.0


class NoDirectory(Exception):
    """An older agent, or one that tells too many others already: it is asked by lookups."""


class OwnDirectory(Exception):
    """The address leads to this agent itself."""


class Pace:
    """Lets directories use a quarter of the event loop's time together, whatever peers send."""

    SHARE = 0.25
    # Reading a message costs that beside taking it in.
    MESSAGE_COST_S = 50e-6
    SOON_S = 1e-3

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._owed_s = 0.0

    async def take(self, work: Callable[[], None]) -> None:
        """Do it when its turn has come; what it raises is raised here."""
        async with self._turn:
            begun_s = time.perf_counter()
            try:
                work()
            finally:
                self._owed_s += time.perf_counter() - begun_s + self.MESSAGE_COST_S
                if self._owed_s > self.SOON_S:
                    owed_s, self._owed_s = self._owed_s, 0.0
                    await asyncio.sleep(owed_s * (1 / self.SHARE - 1))


class DirectoryLink:
    """One peer's.

    Args:
        own_id: of this agent.
        pace: shared by all links.
    """

    def __init__(self, peer: Peer, own_id: str, metrics: AgentMetrics, pace: Pace) -> None:
        self._peer = peer
        self._own_id = own_id
        self._metrics = metrics
        self._pace = pace
        self._said: set[str] = set()

    async def run(self) -> None:
        """For ever."""
        pause_s = RETRY_MIN_S
        loop = asyncio.get_running_loop()
        while True:
            begun_s = loop.time()
            wait_s, pause_s = pause_s, min(2 * pause_s, RETRY_MAX_S)
            try:
                await self._follow()
                self._is(Following.CONNECTING)
            except NoDirectory:
                self._is(Following.NONE)
                wait_s = ASK_AGAIN_S
            except OwnDirectory:
                self._is(Following.SELF)
                wait_s = ASK_AGAIN_S
            except (DirectoryGap, DirectoryTooLarge) as error:
                wait_s = self._begin_anew(error, wait_s)
            except FAULTS as error:
                self._lost(error)
            except Exception as error:
                logger.exception("the link to peer %s failed", self._peer.name)
                self._lost(error)
            if loop.time() - begun_s > STEADY_S:
                wait_s = pause_s = RETRY_MIN_S
                self._said.clear()
            await asyncio.sleep(wait_s)

    async def _follow(self) -> None:
        """Until the peer ends the stream."""
        async with asyncio.timeout(SILENCE_S):
            response = await self._peer.follow_directory()  # type: ignore[no-untyped-call]
        async with response:
            if response.status in (404, 405, 503):
                raise NoDirectory
            await check_status(response)
            pings = asyncio.create_task(self._ping())
            try:
                while (message := await self._next(response)) is not None:
                    await self._pace.take(functools.partial(self._take, message))
            finally:
                pings.cancel()

    def _take(self, message: Message) -> None:
        directory = self._peer.directory
        directory.apply(message)
        if isinstance(message, Start) and directory.agent_id == self._own_id:
            directory.forget()
            raise OwnDirectory
        following = Following.SYNCED if directory.is_whole else Following.CONNECTING
        if following is not self._peer.following:
            self._peer.note_reached(following)
            self._is(following)

    def _begin_anew(self, error: DirectoryGap | DirectoryTooLarge, wait_s: float) -> float:
        """Returns when to try again; until then the peer is asked by lookups."""
        too_large = isinstance(error, DirectoryTooLarge)
        cause = "too large" if too_large else "gap"
        self._metrics.directory_resyncs.labels(self._peer.name, cause).inc()
        self._is(Following.NONE if too_large else Following.CONNECTING)
        if cause not in self._said:
            self._said.add(cause)
            logger.warning("the directory of peer %s is of no use: %s", self._peer.name, error)
        return ASK_AGAIN_S if too_large else wait_s

    def _lost(self, error: Exception) -> None:
        self._is(Following.DOWN)
        self._peer.note_lost(error)

    def _is(self, following: Following) -> None:
        self._peer.following = following
        synced = following is Following.SYNCED
        self._metrics.directory_synced.labels(self._peer.name).set(synced)

    async def _next(self, response: aiohttp.ClientResponse) -> Message | None:
        """The next message; None when the stream has ended between two."""
        head = await self._read(response, directory_wire.LENGTH.size)
        if not head:
            return None
        async with asyncio.timeout(MESSAGE_S):
            size = directory_wire.body_size(head)
            body = await self._read(response, size)
        if len(body) < size:
            raise WireError("closed", "the stream was cut off")
        return directory_wire.unpack(body)

    async def _read(self, response: aiohttp.ClientResponse, size: int) -> bytes:
        """That many bytes, or none at the end; TimeoutError after silence."""
        received = bytearray()
        silent = 0
        while len(received) < size:
            try:
                async with asyncio.timeout(SILENCE_S / SLICES):
                    part = await response.content.read(size - len(received))
            except TimeoutError:
                silent += 1
                if silent == SLICES:
                    raise TimeoutError(f"nothing heard for {SILENCE_S:g} s") from None
                continue
            if not part:
                if received:
                    raise WireError("closed", "the stream was cut off")
                return b""
            silent = 0
            received += part
        return bytes(received)

    async def _ping(self) -> None:
        """Measure the round trip now and then; the stream, not this, tells who is down."""
        while True:
            with contextlib.suppress(PeerFailure):
                await self._peer.ping()
            await asyncio.sleep(PING_S)
