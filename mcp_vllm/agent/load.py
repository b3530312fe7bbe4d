"""Bringing one load's chunks into an engine: from our store, then from peers, before a deadline.

Each chunk comes from its nearest holder (`nearest`). Whatever fails is tried at the next holder;
what is left at the end is reported as failed and the engine recomputes it. Frames are verified
before they become visible to the engine or the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from mcp_vllm.agent import wire
from mcp_vllm.agent.chains import by_group
from mcp_vllm.agent.codecs import EngineCodecs
from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.lander import Arrival, Lander
from mcp_vllm.agent.landing import LandingSlots
from mcp_vllm.agent.load_watch import LoadWatch
from mcp_vllm.agent.nearest import next_errand
from mcp_vllm.agent.peer import FetchedFrame, Peer, PeerFailure, Wanted
from mcp_vllm.agent.reader import Reader
from mcp_vllm.agent.received import check_received, check_sealed
from mcp_vllm.codec import ChecksumError, CodecError, decode_frame_into
from mcp_vllm.codec.loss import EXACT
from mcp_vllm.link.protocol import SLOWER, GroupLayout, Landed, Loaded, group_index
from mcp_vllm.security.seals import SealError
from mcp_vllm.store.ram import Chunk, ChunkKey

logger = logging.getLogger(__name__)

Holders = Mapping[bytes, Sequence[Peer]]
LOCAL = "agent"


@dataclass
class _Outcome:
    """How one fetch from one peer went.

    Attributes:
        damage: the first frame that was not what it claimed to be.
        is_counted: the stream failed, which the peer has counted.
    """

    num_landed: int = 0
    damage: CodecError | None = None
    is_counted: bool = False


@dataclass
class LoadJob:
    """One load of an engine, from start to Loaded.

    Args:
        keys: what to bring.
        ends: of each, the tokens of the context up to its end; empty if not known.
        groups: chunk layouts of the engine, by group index.
        holders: peers that said they have a key, the nearest first.
        reader: on whose behalf.
        send: sends a message to the engine.
        watch: ends the load when computing is quicker; None: never.
    """

    context: AgentContext
    slots: LandingSlots
    namespace: bytes
    job_id: int
    keys: Sequence[bytes]
    ends: Sequence[int]
    groups: Sequence[GroupLayout]
    holders: Holders
    reader: Reader
    send: Callable[[Landed | Loaded], Awaitable[None]]
    watch: LoadWatch | None = None
    losses: dict[int, str] = field(default_factory=dict)
    _missing: set[int] = field(default_factory=set)
    _causes: dict[str, None] = field(default_factory=dict)
    _sources: dict[str, None] = field(default_factory=dict)
    _raw_bytes: int = 0
    _wire_bytes: int = 0
    _asked: Peer | None = None

    async def run(self, deadline_s: float) -> None:
        """Do it; sends Loaded in the end, whatever happened."""
        self._missing = set(range(len(self.keys)))
        try:
            async with asyncio.timeout(deadline_s) as timeout:
                if self.watch is None or self.watch.worth_beginning():
                    with self.context.metrics.load_seconds.time(), self._watched(timeout):
                        await self._from_store()
                        await self._from_peers()
        except TimeoutError:
            self._out_of_time(deadline_s)
        except Exception as error:
            if isinstance(error, ExceptionGroup) and error.subgroup(ConnectionError):
                raise ConnectionError("the engine went away") from error
            self._causes["internal"] = None
            logger.exception("a load failed")
        if self.watch is not None and self.watch.gave_up:
            self._causes = {SLOWER: None, **self._causes}
        self._report()
        await self.send(
            Loaded(
                self.job_id,
                sorted(self._missing),
                self._raw_bytes,
                self._wire_bytes,
                list(self._sources),
                list(self._causes),
                list(self.losses.items()),
            )
        )

    def _out_of_time(self, deadline_s: float) -> None:
        """The load was ended: at its deadline, or by its watch."""
        gave_up = self.watch is not None and self.watch.gave_up
        if not gave_up:
            self._causes["timeout"] = None
        if self._asked is None:
            return
        if not gave_up:
            detail = f"a load took longer than {deadline_s:g} s"
        elif self.watch is not None and self.watch.brought_nothing(self._asked):
            detail = "nothing came while computing would have been quicker"
        else:
            return  # it is slow, which its meter knows
        self._asked.note_failure("timeout", detail, fetching=True)

    @contextlib.contextmanager
    def _watched(self, timeout: asyncio.Timeout) -> Iterator[None]:
        if self.watch is None:
            yield
            return
        self.watch.start(timeout)
        try:
            yield
        finally:
            self.watch.finish(len(self._missing))

    async def _from_store(self) -> None:
        names = {index: self._held_name(index) for index in self._in_order()}
        for chain in by_group(filter(None, names.values())):
            self.context.tiers.touch(chain)
        async with asyncio.TaskGroup() as tasks:
            lander = self._lander(tasks)
            for index, name in names.items():
                if name is None:
                    continue
                await lander.room()
                chunk = self.context.store.get(name)
                if chunk is not None:
                    lander.put(self._stored(index, name, chunk, "store"))
                else:
                    tasks.create_task(self._from_below(index, name, lander))

    async def _from_peers(self) -> None:
        tried: set[Peer] = set()
        while self._missing:
            errand = next_errand(self._in_order(), self._holders_of, tried)
            if errand is None:
                self._causes.setdefault("gone")
                return
            wanted = {self._name(index): index for index in errand.wanted}
            with self.context.flights.claim(list(wanted)) as claimed:
                if claimed:
                    tried.add(errand.peer)
                    self._asked = errand.peer
                    await self._fetch(errand.peer, [wanted[name] for name in claimed])
                    self._asked = None
            await self._from_other_flights([name for name in wanted if name not in claimed])

    def _in_order(self) -> list[int]:
        """What is missing, from the beginning of the context: if the rest does not come, what has
        come is a prefix."""
        return sorted(self._missing, key=lambda i: (self.ends[i] if self.ends else 0, i))

    async def _from_other_flights(self, names: Sequence[ChunkKey]) -> None:
        """Take what other loads were fetching, when they have it; what failed stays missing."""
        if not names:
            return
        for name in names:
            await self.context.flights.wait(name)
        await self._from_store()

    async def _fetch(self, peer: Peer, wanted: Sequence[int]) -> None:
        outcome = _Outcome()
        async with asyncio.TaskGroup() as tasks:
            # Decoding keeps up with the stream or slows it down.
            lander = self._lander(tasks)
            try:
                while wanted:
                    codec, count = self._next_request(peer, wanted)
                    asked, wanted = wanted[:count], wanted[count:]
                    lacking = set(asked)
                    async with contextlib.aclosing(self._frames(peer, asked, codec)) as frames:
                        async for fetched in frames:
                            index = asked[fetched.index]
                            lacking.discard(index)
                            self._wire_bytes += len(fetched.frame)
                            await lander.room()
                            self._put_fetched(peer, index, fetched, lander, outcome)
                    lacked = [self.keys[index] for index in lacking]
                    peer.note_lacking(self.namespace, lacked, self.reader)
            except PeerFailure as failure:
                # What came before the failure is whole and lands. The peer has counted it.
                self._causes[failure.cause] = None
                outcome.is_counted = True
        if outcome.damage is not None:
            cause = _cause_of(outcome.damage)
            self._causes[cause] = None
            peer.note_failure(cause, str(outcome.damage), fetching=True)
        elif outcome.num_landed and not outcome.is_counted:
            peer.note_fetched()
        elif not outcome.is_counted:
            peer.note_failure("gone", "it had nothing of what it said it has", fetching=True)

    def _next_request(self, peer: Peer, wanted: Sequence[int]) -> tuple[str, int]:
        """The codec to ask for, and how many of the wanted chunks."""
        context = self.context
        sizes = [self._group(index).raw_bytes for index in wanted]
        accepted = context.codecs.acceptable(self.reader.lossy)
        speeds = context.codecs.speeds(self.namespace)
        return peer.plan.next_request(sizes, accepted, speeds, context.codec_threads)

    def _frames(
        self, peer: Peer, asked: Sequence[int], codec: str
    ) -> AsyncGenerator[FetchedFrame, None]:
        keys = [self.keys[index] for index in asked]
        bounds = [self._group(index).raw_bytes + wire.FRAME_SLACK_BYTES for index in asked]
        wanted = Wanted(
            codec,
            self.reader,
            self._coding.calibration_id,
            # Its directory may not know yet that it is dead: that costs a lookup's time, no more.
            answer_s=self.context.config.agent.lookup_ms / 1000,
        )
        return peer.fetch(self.namespace, keys, bounds, wanted)

    def _put_fetched(
        self, peer: Peer, index: int, fetched: FetchedFrame, lander: Lander, outcome: _Outcome
    ) -> None:
        """Land a peer's frame that is what it should be."""
        group, frame = self._group(index), fetched.frame
        name = ChunkKey(self.namespace, self.keys[index], fetched.tenant)

        def damaged(error: CodecError) -> None:
            outcome.damage = outcome.damage or error

        try:
            lossy = self.reader.lossy
            header, loss = check_received(frame, fetched.loss, group.raw_bytes, lossy)
            check_sealed(self.context, name, frame)
        except CodecError as error:
            lander.give_back()
            damaged(error)
            return

        def landed() -> None:
            self._landed(index, loss)
            peer.plan.learn_ratio(header.codec_name, group.raw_bytes / len(frame))
            outcome.num_landed += 1
            self._sources[peer.name] = None
            self.context.metrics.loaded_chunks.labels("peer").inc()
            chunk = Chunk(group.codec_layout, group.raw_bytes, frame=frame, loss=loss)
            self.context.store.put(name, chunk)

        fill = partial(self._decode, frame, name=name)
        lander.put(Arrival(index, group.raw_bytes, fill, landed, damaged))

    async def _from_below(self, index: int, name: ChunkKey, lander: Lander) -> None:
        tier = "disk" if name in self.context.tiers else "shared"
        chunk = await self.context.tiers.get(name)
        if chunk is None:
            lander.give_back()
        else:
            lander.put(self._stored(index, name, chunk, tier))

    def _stored(self, index: int, name: ChunkKey, chunk: Chunk, tier: str) -> Arrival:
        def landed() -> None:
            self._landed(index, chunk.loss)
            self._sources[LOCAL] = None
            self.context.metrics.loaded_chunks.labels(tier).inc()

        def damaged(error: CodecError) -> None:
            self._causes["checksum"] = None
            logger.warning("a stored chunk is damaged and was dropped: %s", error)
            self.context.tiers.discard(name)

        fill = partial(self._restore, chunk, name=name)
        return Arrival(index, self._group(index).raw_bytes, fill, landed, damaged)

    def _lander(self, tasks: asyncio.TaskGroup) -> Lander:
        async def announce(filled: Sequence[tuple[int, int]]) -> None:
            await self.send(Landed(self.job_id, list(filled)))

        return Lander(self.context, self.slots, tasks, announce)

    def _landed(self, index: int, loss: str) -> None:
        """The engine has been told of it."""
        if loss != EXACT:
            self.losses[index] = loss
        self._missing.discard(index)
        self._raw_bytes += self._group(index).raw_bytes
        if self.watch is not None:
            self.watch.landed(index)

    def _report(self) -> None:
        cause = next(iter(self._causes), "gone")
        if self._missing:
            self.context.metrics.failed_chunks.labels(cause).inc(len(self._missing))

    @property
    def _coding(self) -> EngineCodecs:
        return self.context.codecs.engine(self.namespace)

    def _decode(self, frame: bytes, out: memoryview, name: ChunkKey) -> None:
        """Runs in the pool."""
        key, coding = name.key, self._coding
        opened = self.context.seals.open(frame, name.namespace, name.tenant)
        kv, calibration = coding.kv_of(key), coding.calibration
        decode_frame_into(opened, out, key=key, kv=kv, calibration=calibration)

    def _restore(self, chunk: Chunk, out: memoryview, name: ChunkKey) -> None:
        """Runs in the pool."""
        raw, frame = chunk.raw, chunk.frame
        if frame is not None:
            self._decode(frame, out, name)
        elif raw is not None:
            if raw.nbytes != out.nbytes:
                key = name.key.hex()
                raise CodecError(f"chunk {key} has {raw.nbytes} bytes, not {out.nbytes}")
            np.copyto(np.frombuffer(out, dtype=np.uint8), raw)

    def _group(self, index: int) -> GroupLayout:
        return self.groups[group_index(self.keys[index])]

    def _name(self, index: int) -> ChunkKey:
        return self.reader.own(self.namespace, self.keys[index])

    def _held_name(self, index: int) -> ChunkKey | None:
        """The chunk as it is here, if it can be read; None when it is not."""
        return self.context.readable(self.reader, self.namespace, self.keys[index])

    def _holders_of(self, index: int) -> Sequence[Peer]:
        return self.holders.get(self.keys[index], ())


def _cause_of(damage: CodecError) -> str:
    if isinstance(damage, ChecksumError):
        return "checksum"
    return "sealed" if isinstance(damage, SealError) else "malformed"
