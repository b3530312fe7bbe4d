"""What two agents say to each other: HTTP with msgpack bodies; blocks as a stream of frames.

- `GET /v1/hello` -> `PeerHello`: who answers, and which fingerprints its engines have.
- `POST /v1/blocks/lookup` with `LookupRequest` -> `LookupReply`: one flag a key, and how fast the
  holder can make frames of which codec. When the asked namespace is unknown there, the reply
  carries the known fingerprints, so that the asker can name the field that differs.
- `POST /v1/blocks/fetch` with `FetchRequest` -> `200`, body: for each key that is still there, in
  the order asked, `FRAME_HEAD` (index of the key in the request, rank of the loss that its content
  has suffered before, index of the tenant whose chunk it is, length of the frame) and the frame; at
  the end a head with `END_INDEX` and length 0. A body that ends without it was cut off.
- `POST /v1/directory`: a stream of what is there, as it changes (`directory_wire`).

A request names the lossy tiers that the asker accepts; what has suffered another is a miss for it.
It names the tenants whose chunks it may use, its own first: chunks of others do not exist for it.

Every request names the protocol version; another version is answered with 409 and a sentence.
"""

from __future__ import annotations

import struct
from typing import Any, Final, TypeVar

import msgspec

from mcp_vllm.codec.loss import LOSSY_TIERS
from mcp_vllm.errors import McpError
from mcp_vllm.link.prefill import PrefillCost
from mcp_vllm.link.protocol import MAX_MESSAGE_BYTES
from mcp_vllm.session.manifest import DEFAULT_TENANT

WIRE_VERSION: Final = 2
MAX_REQUEST_BYTES: Final = MAX_MESSAGE_BYTES
MAX_KEYS: Final = 1 << 17
FRAME_HEAD: Final = struct.Struct(">IBBQ")
END_INDEX: Final = 0xFFFFFFFF
# A frame is never larger than its raw bytes plus a header; this bounds the header generously.
FRAME_SLACK_BYTES: Final = 64 << 10
MAX_FINGERPRINTS: Final = 8
MAX_TENANTS: Final = 64
MAX_KEY_IDS: Final = 64


class WireError(McpError):
    """A peer sent what the protocol does not allow. `cause` is a short word for metrics."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class PeerHello(msgspec.Struct):
    version: int
    agent_id: str
    fingerprints: list[dict[str, str]]


class LookupRequest(msgspec.Struct):
    """`opens[i]`: ids of the keys that open sealed frames of `tenants[i]` there; empty: only what
    is not sealed can be read."""

    version: int
    namespace: bytes
    keys: list[bytes]
    lossy: list[str] = []
    tenants: tuple[str, ...] = (DEFAULT_TENANT,)
    opens: list[list[str]] = []


class LookupReply(msgspec.Struct):
    """`present[i]` is 1 when key i can be fetched; empty when the namespace is unknown here.

    Attributes:
        stored_codec: of frames that are ready to be sent.
        send_bytes_s: codec -> raw bytes a second at which stored frames become frames of it.
        prefill: what computing costs an engine of that namespace there, where that was measured.
    """

    present: bytes
    fingerprints: list[dict[str, str]] = []
    stored_codec: str = ""
    send_bytes_s: dict[str, float] = {}
    prefill: PrefillCost | None = None


class FetchRequest(msgspec.Struct):
    """Frames of `codec` are wanted; empty, or one that the holder lacks: as they are stored.

    `calibration_id` is of the asker's calibration: frames of another cannot be decoded there.
    """

    version: int
    namespace: bytes
    keys: list[bytes]
    codec: str = ""
    lossy: list[str] = []
    calibration_id: bytes = b""
    tenants: tuple[str, ...] = (DEFAULT_TENANT,)


class SessionOffer(msgspec.Struct):
    """A session that can be fetched: its manifest, encoded, and what of it is there.

    Not every key of a chain is: of sliding windows, only the last ones are kept. `sizes[i]` is the
    raw size of the chunk `keys[i]`.
    """

    manifest: bytes
    keys: list[bytes]
    sizes: list[int]


class SessionPull(msgspec.Struct):
    """Fetch a session from the agent of that id.

    Attributes:
        releases: it is going to be released there, so it must outlive the receiver where it can.
        replica: it goes on living there; this is a copy in case that agent is lost.
        bytes_s: no faster than so many bytes a second; 0: as fast as it goes.
    """

    agent_id: str
    releases: bool = False
    replica: bool = False
    bytes_s: float = 0.0


class SessionRelease(msgspec.Struct):
    """The agent of that id does not need its copy of a session there any more."""

    agent_id: str


_T = TypeVar("_T")


def encode(message: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(message)


def decode(kind: type[_T], body: bytes) -> _T:
    """`body` as a message of that kind.

    Raises:
        WireError: it is none.
    """
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError("malformed", f"malformed {kind.__name__}: {error}") from error


def check_version(version: int) -> None:
    """Raises WireError when it is another one."""
    if version != WIRE_VERSION:
        raise WireError(
            "version", f"this agent speaks version {WIRE_VERSION}, the request {version}"
        )


def check_keys(request: Any) -> None:
    """Bounds of a lookup or fetch request.

    Raises:
        WireError: another version, or too many or too long keys.
    """
    check_version(request.version)
    if not 0 < len(request.tenants) <= MAX_TENANTS:
        raise WireError("malformed", f"no tenant, or more than {MAX_TENANTS}")
    if len(request.lossy) > len(LOSSY_TIERS):
        raise WireError("malformed", "more lossy tiers than there are")
    if len(request.keys) > MAX_KEYS or any(not 4 < len(key) <= 128 for key in request.keys):
        raise WireError("malformed", "too many keys, or a key of impossible length")


def check_opens(request: LookupRequest) -> None:
    """Raises WireError when `opens` does not fit `tenants`."""
    fits = len(request.opens) in (0, len(request.tenants))
    if not fits or any(len(ids) > MAX_KEY_IDS for ids in request.opens):
        raise WireError("malformed", "key ids that do not fit the tenants")
