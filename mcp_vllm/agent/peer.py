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
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from mcp_vllm.agent import wire
from mcp_vllm.agent.breaker import Breaker
from mcp_vllm.agent.link_meter import LinkMeter
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

# Of what a peer says, this much goes into a log line.
MAX_DETAIL_CHARS = 500
# A parked session is woken before its manifest is answered; a pull is a whole transfer.
MANIFEST_S = 60.0
PULL_S = 3600.0


class PeerFailure(McpError):
    """A request to a peer did not work out. `cause` is a short word for metrics."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Wanted:
    """How frames are asked for: in `codec` ("": as stored), for `reader`, by the calibration of
    that id."""

    codec: str
    reader: Reader
    calibration_id: bytes = b""


@dataclass(frozen=True)
class FetchedFrame:
    """A frame for key `index` of a request, what its content has lost before (`codec.loss`), and
    whose chunk it is."""

    index: int
    frame: bytes
    loss: str
    tenant: str


class Peer:
    """One configured peer.

    Args:
        name: "HOST:PORT" as configured; also its name in metrics and logs.
        http: shared client session.
        stall_s: a connection, and each read from it, may take that long.
        security: our certificate and token for it.
    """

    def __init__(
        self,
        name: str,
        http: aiohttp.ClientSession,
        metrics: AgentMetrics,
        stall_s: float,
        security: AgentSecurity,
    ) -> None:
        self.name = name
        self.breaker = Breaker()
        self.plan = TransferPlan()
        self._http = http
        self._metrics = metrics
        # aiohttp's own read timeout is not used: when the end of a body arrives while reading is
        # paused, it stays armed on the pooled connection and fails a later request (3.14).
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_s, connect=stall_s)
        self._stall_s = stall_s
        self._security = security
        self._fetch_fails = False
        self._logged_causes: set[str] = set()
        self._logged_fields: set[str] = set()
        metrics.peer_up.labels(name).set(1)

    async def hello(self) -> wire.PeerHello:
        """Who is there. Raises PeerFailure."""
        try:
            async with (
                asyncio.timeout(self._stall_s),
                self._get(self._url("hello")) as response,
            ):
                return wire.decode(wire.PeerHello, await self._body(response))
        except (aiohttp.ClientError, OSError, TimeoutError, WireError) as error:
            raise self._failure(error) from error

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
            async with self._post(self._url("blocks/lookup"), request) as response:
                reply = wire.decode(wire.LookupReply, await self._body(response))
            if reply.fingerprints:
                self._report_mismatch(fingerprint, reply.fingerprints)
            present = reply.present or bytes(len(keys))
            if len(present) != len(keys):
                raise WireError("malformed", "the answer does not fit the question")
            self.plan.learn_sender(reply.stored_codec, reply.send_bytes_s)
            self.plan.learn_prefill(fingerprint.digest, reply.prefill)
        except asyncio.CancelledError:
            self.note_failure("timeout", "no answer to a lookup within the deadline")
            raise
        except (aiohttp.ClientError, OSError, TimeoutError, WireError) as error:
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
        previous = -1
        asked_s = time.perf_counter()
        try:
            async with asyncio.timeout(self._stall_s):
                response = await self._post(self._url("blocks/fetch"), request)
            self.plan.meter.note_latency(time.perf_counter() - asked_s)
            async with response:
                await self._check_status(response)
                while True:
                    head = await self._read(response, wire.FRAME_HEAD.size)
                    index, loss_rank, tenant, size = wire.FRAME_HEAD.unpack(head)
                    if index == wire.END_INDEX:
                        await self._end_of(response)
                        break
                    if not previous < index < len(keys):
                        raise WireError("malformed", f"a frame for key {index} of {len(keys)}")
                    previous = index
                    if tenant >= len(wanted.reader.tenants):
                        raise WireError("malformed", "a frame of a tenant that was not asked for")
                    if size > max_frame_bytes[index]:
                        raise WireError("oversized", f"a frame of {size} bytes for key {index}")
                    loss = self._accepted_loss(loss_rank, wanted.reader.lossy)
                    frame = await self._read(response, size, self.plan.meter)
                    self._metrics.wire_received_bytes.labels(self.name).inc(len(head) + size)
                    yield FetchedFrame(index, frame, loss, wanted.reader.tenants[tenant])
        except (aiohttp.ClientError, OSError, TimeoutError, WireError) as error:
            raise self._failure(error, fetching=True) from error

    async def manifest(self, key: SessionKey) -> tuple[Manifest, dict[bytes, int]]:
        """A session there, and the raw bytes of those of its chunks that are there.

        Raises PeerFailure.
        """
        try:
            async with (
                asyncio.timeout(MANIFEST_S),
                self._get(self._session_url(key, "manifest")) as response,
            ):
                offer = wire.decode(wire.SessionOffer, await self._body(response))
            manifest = decode_manifest(offer.manifest)
            sizes = dict(zip(offer.keys, offer.sizes, strict=False))
            foreign = sizes.keys() - set(manifest.chunk_keys())
            if manifest.key != key or foreign or len(offer.keys) != len(offer.sizes):
                raise WireError("malformed", "a manifest that contradicts itself")
        except ArchiveError as error:
            raise self._failure(WireError("malformed", str(error))) from error
        except (aiohttp.ClientError, OSError, TimeoutError, WireError) as error:
            raise self._failure(error) from error
        return manifest, sizes

    async def pull(self, key: SessionKey, agent_id: str, *, releases: bool = False) -> Transfer:
        """Let the peer fetch a session from the agent of that id, which is going to release it or
        not. Raises PeerFailure."""
        asked = wire.SessionPull(agent_id, releases)
        try:
            async with (
                asyncio.timeout(PULL_S),
                self._post(self._session_url(key, "pull"), asked) as response,
            ):
                return wire.decode(Transfer, await self._body(response))
        except (aiohttp.ClientError, OSError, TimeoutError, WireError) as error:
            raise self._failure(error) from error

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

    def _failure(self, error: Exception, *, fetching: bool = False) -> PeerFailure:
        cause = _cause(error)
        detail = str(error)[:MAX_DETAIL_CHARS] or type(error).__name__
        self.note_failure(cause, detail, fetching=fetching)
        return PeerFailure(cause, f"peer {self.name}: {detail}")

    def _report_mismatch(self, ours: Fingerprint, theirs: list[dict[str, str]]) -> None:
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

    def _url(self, path: str) -> URL:
        return URL(f"{self._security.scheme}://{self.name}/v1/{path}")

    def _session_url(self, key: SessionKey, operation: str) -> URL:
        names = (quote(name, safe="") for name in (key.tenant, key.session_id))
        path = f"v1/sessions/{'/'.join(names)}/{operation}"
        return URL(f"{self._security.scheme}://{self.name}/{path}", encoded=True)

    def _get(self, url: URL):  # type: ignore[no-untyped-def]
        return self._http.get(
            url,
            timeout=self._timeout,
            allow_redirects=False,
            **self._security.request_options(),
        )

    def _post(self, url: URL, request: msgspec.Struct):  # type: ignore[no-untyped-def]
        return self._http.post(
            url,
            data=wire.encode(request),
            timeout=self._timeout,
            allow_redirects=False,
            **self._security.request_options(),
        )

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        await self._check_status(response)
        body = bytearray()
        async for part in response.content.iter_any():
            body += part
            if len(body) > wire.MAX_REQUEST_BYTES:
                raise WireError("oversized", "an answer larger than any answer may be")
        return bytes(body)

    async def _read(
        self, response: aiohttp.ClientResponse, size: int, meter: LinkMeter | None = None
    ) -> bytes:
        """Exactly `size` bytes of the body; TimeoutError when none comes for `stall_s`.

        `meter` is told of each part as it comes, and of the wait for one that does not.
        """
        received = bytearray()
        while len(received) < size:
            begun_s = time.perf_counter()
            try:
                async with asyncio.timeout(self._stall_s):
                    part = await response.content.read(size - len(received))
            except (asyncio.CancelledError, TimeoutError):
                if meter is not None:
                    meter.note_silence(time.perf_counter() - begun_s)
                raise
            if meter is not None and part:
                meter.note_payload(len(part), time.perf_counter() - begun_s)
            if not part:
                raise WireError("closed", "the stream was cut off")
            received += part
        return bytes(received)

    @staticmethod
    def _accepted_loss(loss_rank: int, lossy: Sequence[str]) -> str:
        """The loss of that rank. Raises WireError when there is none, or it was not asked for."""
        if loss_rank >= len(LOSSES):
            raise WireError("malformed", f"a loss of rank {loss_rank}")
        loss = LOSSES[loss_rank]
        if not is_acceptable(loss, lossy):
            raise WireError("lossy", f"a chunk that went through {loss}, which is not accepted")
        return loss

    async def _end_of(self, response: aiohttp.ClientResponse) -> None:
        """Read the end of the body, so that the connection can be used again."""
        async with asyncio.timeout(self._stall_s):
            if await response.content.read(1):
                raise WireError("malformed", "bytes after the last frame")

    async def _check_status(self, response: aiohttp.ClientResponse) -> None:
        if response.status != 200:
            detail = (await response.content.read(500)).decode(errors="replace")
            raise WireError(f"http {response.status}", detail)


def _cause(error: Exception) -> str:
    if isinstance(error, WireError):
        return error.cause
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "connect"
    if isinstance(error, aiohttp.ClientResponseError):
        return "malformed"
    return "closed"
