"""Our view of one peer agent: ask it what it has, fetch frames from it, and avoid it when it fails.

No method waits longer than its deadline, and every failure is a `PeerFailure` with a one-word
cause, counted and logged once per cause until the peer works again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import aiohttp
import numpy as np

from mcp_vllm.agent import wire
from mcp_vllm.agent.breaker import Breaker
from mcp_vllm.agent.chunk_set import Hashes, hash_as
from mcp_vllm.agent.directory_view import DirectoryView
from mcp_vllm.agent.peer_http import (
    FAULTS,
    MAX_DETAIL_CHARS,
    Member,
    PeerHttp,
    cause_of,
    check_status,
    session_path,
)
from mcp_vllm.agent.reader import Reader
from mcp_vllm.agent.security import AgentSecurity
from mcp_vllm.agent.transfer_plan import TransferPlan
from mcp_vllm.agent.wire import WireError
from mcp_vllm.codec.loss import LOSSES, is_acceptable
from mcp_vllm.errors import McpError
from mcp_vllm.session.api import Transfer
from mcp_vllm.session.archive import ArchiveError, decode_manifest
from mcp_vllm.session.fingerprint import Fingerprint
from mcp_vllm.session.manifest import Manifest, SessionKey
from mcp_vllm.telemetry.agent_metrics import AgentMetrics

logger = logging.getLogger(__name__)

# A parked session is woken before its manifest is answered; a pull is a whole transfer.
MANIFEST_S = 60.0
PULL_S = 3600.0


class Following(StrEnum):
    """What is known of a peer's directory (`directory_link`)."""

    CONNECTING = "connecting"  # asked by lookups meanwhile
    SYNCED = "synced"
    NONE = "asked each time"  # an older agent, or too much to note
    DOWN = "down"  # not asked: the link tries
    SELF = "this agent"


class PeerFailure(McpError):
    """A request to a peer did not work out. `cause` is a short word for metrics."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Wanted:
    """How frames are asked for: in `codec` ("": as stored), for `reader`, by the calibration of
    that id; the answer begins within `answer_s` (None: of `stall_s`)."""

    codec: str
    reader: Reader
    calibration_id: bytes = b""
    answer_s: float | None = None


@dataclass(frozen=True)
class FetchedFrame:
    """A frame for key `index` of a request, what its content has lost before (`codec.loss`), and
    whose chunk it is."""

    index: int
    frame: bytes
    loss: str
    tenant: str


class Peer:
    """One peer, configured or discovered.

    Args:
        member: where it is.
        http: shared client session.
        stall_s: a connection, and each read from it, may take that long.
        security: our certificate and token for it.
        directory: what it says it has.

    Attributes:
        name: "HOST:PORT"; also its name in metrics and logs.
        following: set by the link that feeds the directory.
    """

    def __init__(
        self,
        member: Member,
        http: aiohttp.ClientSession,
        metrics: AgentMetrics,
        stall_s: float,
        security: AgentSecurity,
        directory: DirectoryView,
    ) -> None:
        self.member = member
        self.name = member.name
        self.directory = directory
        self.following = Following.CONNECTING
        self.breaker = Breaker()
        self.plan = TransferPlan()
        self._http = PeerHttp(member, http, stall_s, security)
        self._metrics = metrics
        self._stall_s = stall_s
        self._fetch_fails = False
        self._logged_causes: set[str] = set()
        self._logged_fields: set[str] = set()
        metrics.peer_up.labels(self.name).set(1)

    async def hello(self) -> wire.PeerHello:
        """Who is there. Raises PeerFailure."""
        try:
            async with (
                asyncio.timeout(self._stall_s),
                self._http.get("/v1/hello") as response,
            ):
                return wire.decode(wire.PeerHello, await self._http.body(response))
        except FAULTS as error:
            raise self._failure(error) from error

    def follow_directory(self):  # type: ignore[no-untyped-def]
        """The response to a request for its directory, to be entered and read by the link."""
        return self._http.post("/v1/directory", self.directory.follow())

    def find(
        self, fingerprint: Fingerprint, hashes: Sequence[Hashes], reader: Reader
    ) -> Sequence[int]:
        """Which of these keys its directory says are there, by index; nothing is asked.

        `hashes` are those of the reader's tenants, one after the other (`chunk_set.hash_as`).
        Empty too while the peer is avoided. What a lookup would tell of codecs is learned.
        """
        directory, namespace = self.directory, fingerprint.digest
        if not directory.knows(namespace):
            self.report_mismatch(fingerprint, directory.about.fingerprints)
            return ()
        (found,) = np.nonzero(directory.find_any(namespace, hashes, reader))
        if not len(found) or not self.breaker.allow():
            return ()
        about = directory.about
        self.plan.learn_sender(about.stored_codec, about.send_bytes_s.get(namespace, {}))
        self.plan.learn_prefill(namespace, about.prefills.get(namespace))
        indices: list[int] = found.tolist()
        return indices

    async def lookup(
        self, fingerprint: Fingerprint, keys: Sequence[bytes], reader: Reader
    ) -> bytes:
        """One flag a key: 1 when the peer can send what `reader` can use.

        Raises:
            PeerFailure: no usable answer. Cancelling this counts as a failure too, because the
                caller's deadline passed.
        """
        request = wire.LookupRequest(
            wire.WIRE_VERSION,
            fingerprint.digest,
            list(keys),
            list(reader.lossy),
            tuple(reader.tenants),
            [list(ids) for ids in reader.opens],
        )
        try:
            async with self._http.post("/v1/blocks/lookup", request) as response:
                reply = wire.decode(wire.LookupReply, await self._http.body(response))
            if reply.fingerprints:
                self.report_mismatch(fingerprint, reply.fingerprints)
            present = reply.present or bytes(len(keys))
            if len(present) != len(keys):
                raise WireError("malformed", "the answer does not fit the question")
            self.plan.learn_sender(reply.stored_codec, reply.send_bytes_s)
            self.plan.learn_prefill(fingerprint.digest, reply.prefill)
        except asyncio.CancelledError:
            self.note_failure("timeout", "no answer to a lookup within the deadline")
            raise
        except FAULTS as error:
            raise self._failure(error) from error
        if not self._fetch_fails:  # answering questions does not make up for broken transfers
            self._worked()
        return present

    async def fetch(
        self,
        namespace: bytes,
        keys: Sequence[bytes],
        max_frame_bytes: Sequence[int],
        wanted: Wanted,
    ) -> AsyncGenerator[FetchedFrame, None]:
        """Frames as they arrive, in the order of `keys`. Keys the peer lost are left out.

        `max_frame_bytes[i]` bounds the frame of key i before it is read.

        Raises:
            PeerFailure: the stream broke, stalled, or made an impossible claim.
        """
        request = wire.FetchRequest(
            wire.WIRE_VERSION,
            namespace,
            list(keys),
            wanted.codec,
            list(wanted.reader.lossy),
            wanted.calibration_id,
            tuple(wanted.reader.tenants),
        )
        previous, answers = -1, False
        asked_s = time.perf_counter()
        try:
            async with asyncio.timeout(wanted.answer_s or self._stall_s):
                response = await self._http.post("/v1/blocks/fetch", request)
            self.plan.meter.note_latency(time.perf_counter() - asked_s)
            answers = True
            async with response:
                await check_status(response)
                while True:
                    head = await self._http.read(response, wire.FRAME_HEAD.size)
                    index, loss_rank, tenant, size = wire.FRAME_HEAD.unpack(head)
                    if index == wire.END_INDEX:
                        await self._http.end_of(response)
                        break
                    if not previous < index < len(keys):
                        raise WireError("malformed", f"a frame for key {index} of {len(keys)}")
                    previous = index
                    if tenant >= len(wanted.reader.tenants):
                        raise WireError("malformed", "a frame of a tenant that was not asked for")
                    if size > max_frame_bytes[index]:
                        raise WireError("oversized", f"a frame of {size} bytes for key {index}")
                    loss = self._accepted_loss(loss_rank, wanted.reader.lossy)
                    frame = await self._http.read(response, size, self.plan.meter)
                    self._metrics.wire_received_bytes.labels(self.name).inc(len(head) + size)
                    yield FetchedFrame(index, frame, loss, wanted.reader.tenants[tenant])
        except FAULTS as error:
            raise self._failure(error, fetching=answers) from error

    async def manifest(self, key: SessionKey) -> tuple[Manifest, dict[bytes, int]]:
        """A session there, and the raw bytes of those of its chunks that are there.

        Raises PeerFailure.
        """
        try:
            async with (
                asyncio.timeout(MANIFEST_S),
                self._http.get(session_path(key, "manifest")) as response,
            ):
                offer = wire.decode(wire.SessionOffer, await self._http.body(response))
            manifest = decode_manifest(offer.manifest)
            sizes = dict(zip(offer.keys, offer.sizes, strict=False))
            foreign = sizes.keys() - set(manifest.chunk_keys())
            if manifest.key != key or foreign or len(offer.keys) != len(offer.sizes):
                raise WireError("malformed", "a manifest that contradicts itself")
        except ArchiveError as error:
            raise self._failure(WireError("malformed", str(error))) from error
        except FAULTS as error:
            raise self._refusal(error) from error
        return manifest, sizes

    async def pull(self, key: SessionKey, asked: wire.SessionPull) -> Transfer:
        """Let the peer fetch a session from the agent that `asked` names. Raises PeerFailure."""
        try:
            async with (
                asyncio.timeout(PULL_S),
                self._http.post(session_path(key, "pull"), asked) as response,
            ):
                return wire.decode(Transfer, await self._http.body(response))
        except FAULTS as error:
            raise self._refusal(error) from error

    async def release(self, key: SessionKey, agent_id: str) -> None:
        """The agent of that id needs its copy of a session there no more. Raises PeerFailure."""
        try:
            async with (
                asyncio.timeout(self._stall_s),
                self._http.post(
                    session_path(key, "release"), wire.SessionRelease(agent_id)
                ) as response,
            ):
                await check_status(response)
        except FAULTS as error:
            raise PeerFailure(cause_of(error), f"peer {self.name}: {error}") from error

    async def ping(self) -> None:
        """Measure the round trip on a connection that fetches use, too. Raises PeerFailure."""
        try:
            async with asyncio.timeout(self._stall_s):
                for measured in (False, True):  # the first one may pay for the connection
                    asked_s = time.perf_counter()
                    async with self._http.get("/healthz") as response:
                        await self._http.body(response)
                    if measured:
                        self.plan.meter.note_latency(time.perf_counter() - asked_s)
        except FAULTS as error:
            raise PeerFailure(cause_of(error), f"peer {self.name}: {error}") from error

    @property
    def is_down(self) -> bool:
        """Whether its link knows that it is not there."""
        return self.following is Following.DOWN

    def note_lacking(self, namespace: bytes, keys: Sequence[bytes], reader: Reader) -> None:
        """It was asked for these and did not have them, whatever its directory says."""
        for hashes in hash_as(reader.tenants, keys):
            self.directory.drop(namespace, hashes)

    def note_reached(self, following: Following) -> None:
        """The link to its directory works."""
        self.following = following
        if not self._fetch_fails:
            self._worked()

    def note_lost(self, error: Exception) -> None:
        """The link to its directory broke: it is not asked until the link works again."""
        self.following = Following.DOWN
        self.breaker.trip()
        self._failure(error)

    def note_fetched(self) -> None:
        """A fetch ended well and its frames proved good."""
        self._fetch_fails = False
        self._worked()

    def note_failure(self, cause: str, detail: str, *, fetching: bool = False) -> None:
        """Count a failure against this peer and log it, once per cause until it works again.

        After a failed fetch only a fetch shows that it works again.
        """
        self._fetch_fails |= fetching
        self.breaker.failed()
        self._metrics.peer_failures.labels(self.name, cause).inc()
        self._metrics.peer_up.labels(self.name).set(self.breaker.is_closed)
        if cause not in self._logged_causes:
            self._logged_causes.add(cause)
            logger.warning("peer %s: %s (%s)", self.name, cause, detail)

    def _worked(self) -> None:
        self.breaker.succeeded()
        self._metrics.peer_up.labels(self.name).set(1)
        if self._logged_causes:
            logger.info("peer %s works again", self.name)
            self._logged_causes.clear()

    def _refusal(self, error: Exception) -> PeerFailure:
        """Of a question about a session: an answer that says no is no failure of the peer."""
        cause = cause_of(error)
        if cause.startswith("http "):
            return PeerFailure(cause, f"peer {self.name}: {error}")
        return self._failure(error)

    def _failure(self, error: Exception, *, fetching: bool = False) -> PeerFailure:
        cause = cause_of(error)
        detail = str(error)[:MAX_DETAIL_CHARS] or type(error).__name__
        self.note_failure(cause, detail, fetching=fetching)
        return PeerFailure(cause, f"peer {self.name}: {detail}")

    def report_mismatch(self, ours: Fingerprint, theirs: list[dict[str, str]]) -> None:
        """Count and log that its engines, of the fingerprints `theirs`, cannot serve ours."""
        known = [Fingerprint(fields) for fields in theirs[: wire.MAX_FINGERPRINTS]]
        closest = ours.closest(known)
        difference = closest and ours.first_difference(closest)
        if not difference:
            return
        # A field that we do not have is the peer's word: it must not become any number of labels.
        field = difference.field if difference.field in ours.fields else "(theirs)"
        self._metrics.fingerprint_mismatches.labels(self.name, field).inc()
        if field not in self._logged_fields:
            self._logged_fields.add(field)
            detail = str(difference)[:MAX_DETAIL_CHARS]
            logger.warning("peer %s cannot exchange blocks with us: %s", self.name, detail)

    @staticmethod
    def _accepted_loss(loss_rank: int, lossy: Sequence[str]) -> str:
        """The loss of that rank. Raises WireError when there is none, or it was not asked for."""
        if loss_rank >= len(LOSSES):
            raise WireError("malformed", f"a loss of rank {loss_rank}")
        loss = LOSSES[loss_rank]
        if not is_acceptable(loss, lossy):
            raise WireError("lossy", f"a chunk that went through {loss}, which is not accepted")
        return loss
