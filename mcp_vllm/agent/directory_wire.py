"""The directory's protocol: how one agent tells another what it has, as it comes and goes.

`POST /v1/directory` with `Follow` -> `200`, a stream of messages, each 4 bytes of length
(big-endian) and a msgpack array. The reader applies them in order:

1. `Start` comes first, and again whenever the sender begins anew. `resumed`: changes go on after
   `seq`, which is what was asked for. Otherwise forget everything: a snapshot follows.
2. `About`: codecs, speeds and fingerprints, and again when they change.
3. `Slice`, any number: parts of the snapshot. `Whole`: that was all, as of `seq`,
   and so many chunks.
4. `Changes`: what came and went; its `seq` is one more than the one before.
5. `Beat`: nothing happened for a while; `seq` is that of the last change.

A `seq` that does not fit is a gap: the reader forgets everything and follows anew from nothing.
Nothing for `SILENCE_S` means that the sender is dead. The sender ends a stream after `STREAM_S`,
so that credentials are checked again; the reader resumes it. A sender keeps the latest changes
only: who is too far behind, or followed another process there, gets a snapshot.

A chunk is named by the 64-bit hash of its tenant and key (`chunk_set`), big-endian, within its
namespace. Its kind is four times the place in `About.seals` of what its frame is sealed with, plus
the rank of its loss (`codec.loss`).

Sessions are announced in the same messages (`SessionNews`): who has one, and how far it is there.
Fields that an older agent does not know stand last, where it skips them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec
import numpy as np
import xxhash

from mcp_vllm.agent import wire
from mcp_vllm.agent.chunk_set import HASH_BYTES, Hashes
from mcp_vllm.agent.wire import WireError
from mcp_vllm.codec.loss import LOSSES
from mcp_vllm.link.prefill import PrefillCost
from mcp_vllm.session.manifest import SessionKey

LENGTH: Final = struct.Struct(">I")
MAX_MESSAGE_BYTES: Final = 1 << 20
# Hashes in one message.
MAX_HASHES: Final = 4096
# Sessions in one message.
MAX_SESSIONS: Final = 4096
MAX_NAMESPACES: Final = 256
MAX_SEALS: Final = 62
NUM_LOSSES: Final = len(LOSSES)
BEAT_S: Final = 0.4
SILENCE_S: Final = 1.5
STREAM_S: Final = 300.0
_WIRE_HASH: Final = np.dtype(">u8")
_WIRE_SESSION: Final = np.dtype([("hash", ">u8"), ("turns", ">u4"), ("tokens", ">u4")])
_MAX_COUNT: Final = (1 << 32) - 1


class Follow(msgspec.Struct):
    """Tell me everything that comes after change `seq` of the agent `agent_id` (empty: all)."""

    version: int
    agent_id: str = ""
    seq: int = 0


class Start(msgspec.Struct, tag="start", array_like=True):
    agent_id: str
    seq: int
    resumed: bool


class About(msgspec.Struct, tag="about", array_like=True):
    """What a lookup would tell beside the chunks: see `wire.LookupReply`.

    Attributes:
        send_bytes_s: by namespace of the engines known there.
        prefills: what computing costs those engines, where that was measured.
        seals: ids of keys that frames there are sealed with; the first is empty: not sealed. It
            only grows.
    """

    stored_codec: str
    send_bytes_s: dict[bytes, dict[str, float]]
    fingerprints: list[dict[str, str]]
    seals: tuple[str, ...] = ("",)
    prefills: dict[bytes, PrefillCost] = {}


class Entries(msgspec.Struct, array_like=True):
    """Hashes of one namespace: those that are there, by their kind, and those gone."""

    namespace: bytes
    added: list[bytes]
    removed: bytes = b""


class SessionNews(msgspec.Struct, array_like=True, frozen=True):
    """Sessions by `session_hash`: `put` holds 16 bytes each, hash, turns and tokens, for those that
    are there now; `gone` hashes."""

    put: bytes = b""
    gone: bytes = b""


class Slice(msgspec.Struct, tag="slice", array_like=True):
    entries: list[Entries]
    sessions: SessionNews = SessionNews()


class Whole(msgspec.Struct, tag="whole", array_like=True):
    seq: int
    num_chunks: int
    num_sessions: int = 0


class Changes(msgspec.Struct, tag="changes", array_like=True):
    seq: int
    entries: list[Entries]
    sessions: SessionNews = SessionNews()


class Beat(msgspec.Struct, tag="beat", array_like=True):
    seq: int


class SessionState(NamedTuple):
    """How far a session is where it is kept."""

    turns: int
    num_tokens: int


Message = Start | About | Slice | Whole | Changes | Beat
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def pack(message: Message) -> bytes:
    """The message as it goes into the stream, length in front."""
    body = wire.encode(message)
    return LENGTH.pack(len(body)) + body


def body_size(head: bytes) -> int:
    """The size of the body after these 4 bytes. Raises WireError when it is impossible."""
    (size,) = LENGTH.unpack(head)
    if size > MAX_MESSAGE_BYTES:
        raise WireError("oversized", f"a directory message of {size} bytes")
    return int(size)


def unpack(body: bytes) -> Message:
    """Raises WireError when it is no message, or one beyond the bounds."""
    try:
        message = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError("malformed", f"malformed directory message: {error}") from error
    if isinstance(message, Slice | Changes):
        for each in message.entries:
            _check(each)
        _check_sessions(message.sessions)
    elif isinstance(message, About) and (
        max(len(message.send_bytes_s), len(message.prefills)) > MAX_NAMESPACES
        or len(message.seals) > MAX_SEALS
    ):
        raise WireError("malformed", "more namespaces or keys than an agent has")
    return message


def to_wire(hashes: Hashes) -> bytes:
    return hashes.astype(_WIRE_HASH).tobytes()


def from_wire(packed: bytes) -> Hashes:
    return np.frombuffer(packed, dtype=_WIRE_HASH).astype(np.uint64)


def session_hash(key: SessionKey) -> int:
    """64 bits for a session's name, which no name can be told from."""
    tenant = key.tenant.encode()
    named = len(tenant).to_bytes(4, "big") + tenant + key.session_id.encode()
    return xxhash.xxh3_64_intdigest(named)


def pack_sessions(states: Mapping[int, SessionState]) -> bytes:
    """By hash, for `SessionNews.put`."""
    packed = np.empty(len(states), dtype=_WIRE_SESSION)
    for index, (name, state) in enumerate(states.items()):
        packed[index] = (name, min(state.turns, _MAX_COUNT), min(state.num_tokens, _MAX_COUNT))
    return packed.tobytes()


def unpack_sessions(packed: bytes) -> dict[int, SessionState]:
    rows = np.frombuffer(packed, dtype=_WIRE_SESSION).tolist()
    return {name: SessionState(turns, num_tokens) for name, turns, num_tokens in rows}


def _check_sessions(news: SessionNews) -> None:
    if len(news.put) % _WIRE_SESSION.itemsize or len(news.gone) % HASH_BYTES:
        raise WireError("malformed", "sessions of impossible length")
    num_sessions = len(news.put) // _WIRE_SESSION.itemsize + len(news.gone) // HASH_BYTES
    if num_sessions > MAX_SESSIONS:
        raise WireError("oversized", "more sessions than a message may hold")


def _check(entries: Entries) -> None:
    parts = [*entries.added, entries.removed]
    if len(entries.added) > NUM_LOSSES * MAX_SEALS or any(len(part) % HASH_BYTES for part in parts):
        raise WireError("malformed", "hashes of impossible length or loss")
    if sum(map(len, parts)) > MAX_HASHES * HASH_BYTES or len(entries.namespace) > 64:
        raise WireError("oversized", "more hashes than a message may hold")
