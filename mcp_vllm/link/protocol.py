"""The protocol between one engine and its host's context agent.

A Unix stream socket carries small messages; KV bytes stay in two shared memory regions, each of
which only its owner may write:

- the *host chunks* (vLLM's primary tier) belong to the engine, the agent maps them read-only;
- the *landing slots* belong to the agent, the engine maps them read-only.

So neither side can corrupt the other, whatever it does and however late it does it.

Life cycle::

    engine                                agent
      Hello + fd of the host chunks  --->
                                     <---  Welcome + fd of the landing slots   (or Refused)
                                     <---  Inventory(what the agent's store has), and every change
      Prepare(request)               --->                a request was added, with its session
      Lookup(request, keys)          --->                which of these are worth loading?
                                     <---  Found(lookup, one flag a key)
      Load(job, keys)                --->                bring these chunks
                                     <---  Landed(job, slots), any number of times
      Release(slots)                 --->                copied out, the slots are free again
                                     <---  Loaded(job, failed, where from)
      Store(job, keys, host chunks)  --->                these chunks are new and pinned
                                     <---  Stored(job)   copied, not yet visible to anyone
      Commit(job) or Discard(job)    --->                the pin held all the time, or did not
      Finish(request, chain)         --->                the request ended; its session grows

What one tenant has stored is there for its own requests only, or for all where the tenant is one of
`Welcome.shared_tenants`. The engine knows the agent's store by Inventory, so it asks only for what
is not there, and only when the agent has peers that might have it: a request that hits nothing is
not held up.

A stored chunk becomes visible only by Commit: the engine sends it when the chunks were pinned until
Stored arrived. If it gave up waiting it sends Discard, because the bytes may have changed while
they were being copied.

Framing: 4 bytes big-endian length, then one msgpack message. A length above `MAX_MESSAGE_BYTES`,
an unknown message or a message that does not fit its schema ends the connection.
"""

from __future__ import annotations

import functools
import struct
from typing import Annotated, Any, Final, Literal

import msgspec

from mcp_vllm.codec import ChunkLayout, CodecError, KVLayout, planes
from mcp_vllm.codec.loss import EXACT
from mcp_vllm.errors import McpError
from mcp_vllm.link.prefill import PrefillCost
from mcp_vllm.session.manifest import DEFAULT_TENANT

PROTOCOL_VERSION: Final = 2
MAX_MESSAGE_BYTES: Final = 16 << 20
MAX_KEY_BYTES: Final = 128
MAX_PAGES: Final = 1 << 16
LENGTH: Final = struct.Struct(">I")

Key = bytes
# Of tokens, and of the place of a chunk's end in its context.
Tokens = Annotated[int, msgspec.Meta(ge=0, le=1 << 30)]
# Why a load was ended that had not failed: computing the rest is quicker (a cause of `Loaded`).
SLOWER: Final = "slower"


def group_index(key: Key) -> int:
    """The KV cache group of an offload key: its last four bytes, big-endian."""
    return int.from_bytes(key[-4:], "big")


class LinkError(McpError):
    """The other side broke the protocol or went away."""


Arrangement = Literal["token-major", "channel-major-keys", "matrix-tiles", "latent"]


class PageLayout(msgspec.Struct, frozen=True):
    """What the pages of a chunk hold, where that is known: lossy codecs need it (`codec.planes`).

    Attributes:
        layers: the model's own index of each layer, in the order of their pages.
        num_blocks: pages of a layer in a chunk, one after the other.
        num_heads: KV heads; 1 of a latent.
        head_dim: channels of a head, or of a latent.
    """

    arrangement: Arrangement
    layers: tuple[int, ...]
    num_blocks: int
    block_tokens: int
    num_heads: int
    head_dim: int


class GroupLayout(msgspec.Struct, frozen=True):
    """How one KV cache group's chunk lies in a host chunk.

    Attributes:
        spans: (offset, length) in bytes of the parts in use; what lies between belongs to others.
        element: KV element type, as `ChunkLayout.element`.
        channels: elements along the innermost axis, as `ChunkLayout.channels`.
        pages: None where it is not known what they hold.
        tokens: of the context that a chunk holds; 0 where that is not known.
        window_chunks: how many chunks before the end of a context it needs; 0: all of them.
    """

    spans: tuple[tuple[int, int], ...]
    element: str
    channels: int
    pages: PageLayout | None = None
    tokens: Tokens = 0
    window_chunks: Tokens = 0

    @property
    def raw_bytes(self) -> int:
        return sum(length for _, length in self.spans)

    @property
    def codec_layout(self) -> ChunkLayout:
        """Raises CodecError when the description contradicts itself."""
        kv = _kv_layout(self.pages) if self.pages else None
        layout = ChunkLayout(self.element, self.channels, kv)  # type: ignore[arg-type]
        if kv and kv.num_elements * layout.element_size_bytes != self.raw_bytes:
            raise CodecError(f"pages of {kv.num_elements} elements in {self.raw_bytes} bytes")
        return layout


@functools.lru_cache(maxsize=256)
def _kv_layout(pages: PageLayout) -> KVLayout:
    if len(pages.layers) * pages.num_blocks > MAX_PAGES:
        raise CodecError(f"a chunk of more than {MAX_PAGES} pages")
    sizes = (pages.layers, pages.num_blocks, pages.block_tokens)
    match pages.arrangement:
        case "token-major":
            return planes.token_major(*sizes, pages.num_heads, pages.head_dim)
        case "channel-major-keys":
            return planes.channel_major_keys(*sizes, pages.num_heads, pages.head_dim)
        case "matrix-tiles":
            return planes.matrix_tiles(*sizes, pages.num_heads, pages.head_dim)
        case "latent":
            return planes.latent(*sizes, pages.head_dim)


class Hello(msgspec.Struct, tag=True):
    """An engine introduces itself; the fd of its host chunks comes with this message."""

    protocol: int
    engine_id: str
    pid: int
    fingerprint: dict[str, str]
    chunk_bytes: int
    num_chunks: int
    groups: list[GroupLayout]


class Welcome(msgspec.Struct, tag=True):
    """The agent accepts; the fd of the landing slots comes with this message."""

    agent_id: str
    slot_bytes: int
    num_slots: int
    lookup_ms: int
    load_ms: int
    asks_peers: bool = True
    wants_positions: bool = False
    shared_tenants: list[str] = []


class Refused(msgspec.Struct, tag=True):
    """The agent will not serve this engine, and why."""

    reason: str


class Inventory(msgspec.Struct, tag=True):
    """Chunks of a tenant that have come to or gone from the agent's store; all of them after
    Welcome."""

    added: list[Key]
    removed: list[Key]
    tenant: str = DEFAULT_TENANT


class Prepare(msgspec.Struct, tag=True):
    """A request was added; until its Finish the engine counts as busy.

    Attributes:
        salted: its keys are those of requests with the same `cache_salt` only.
        prefill: what computing a prompt costs this engine; None until it was measured.
    """

    request_id: str
    tenant: str
    session_id: str | None
    salted: bool = False
    prefill: PrefillCost | None = None


class Lookup(msgspec.Struct, tag=True):
    """Which of a request's keys are worth loading? `lookup_id` is the engine's, never reused.

    Attributes:
        whole: these are all keys of the prompt, a group's chain after the other's, each from its
            beginning; then what can be computed sooner than loaded is answered as a miss.
    """

    lookup_id: int
    request_id: str
    keys: list[Key]
    tenant: str = DEFAULT_TENANT
    whole: bool = False


class Found(msgspec.Struct, tag=True):
    """`present[i]` is 1 when the lookup's i-th key can and should be loaded, 0 for a miss."""

    lookup_id: int
    present: bytes


class Load(msgspec.Struct, tag=True):
    """Bring these chunks.

    Attributes:
        ends: of each key, the tokens of the context up to the chunk's end; empty if not known.
        computed_tokens: tokens of the context that the engine has anyway.
    """

    job_id: int
    request_id: str
    keys: list[Key]
    tenant: str = DEFAULT_TENANT
    ends: list[Tokens] = []
    computed_tokens: Tokens = 0


class Landed(msgspec.Struct, tag=True):
    """Chunks of a load lie in landing slots: (index into the load's keys, slot)."""

    job_id: int
    slots: list[tuple[int, int]]


class Release(msgspec.Struct, tag=True):
    slots: list[int]


class Loaded(msgspec.Struct, tag=True):
    """A load has ended; `failed` are indices into its keys.

    Attributes:
        raw_bytes: size of the chunks that landed.
        wire_bytes: bytes of those that came over the network, frames included.
        sources: "agent", or the peers' names, in order of first use.
        causes: why chunks failed, one short word each ("timeout", "checksum", `SLOWER`, ...).
        losses: what went through a lossy tier: (index into the load's keys, name of the tier).
    """

    job_id: int
    failed: list[int]
    raw_bytes: int
    wire_bytes: int
    sources: list[str]
    causes: list[str]
    losses: list[tuple[int, str]] = []


class Store(msgspec.Struct, tag=True):
    """`chunk_ids[i]` is the host chunk of `keys[i]`, pinned until Stored.

    Attributes:
        loss: the worst loss of the context that the chunks were computed from (`codec.loss`).
        positions: of each key in its chain; empty unless the agent wants them.
        tenant: whose request computed them.
    """

    job_id: int
    keys: list[Key]
    chunk_ids: list[int]
    loss: str = EXACT
    positions: list[int] = []
    tenant: str = DEFAULT_TENANT


class Stored(msgspec.Struct, tag=True):
    """The store's chunks were copied; `num_bytes` of them were new to the agent."""

    job_id: int
    num_bytes: int


class Commit(msgspec.Struct, tag=True):
    job_id: int


class Discard(msgspec.Struct, tag=True):
    job_id: int


class Finish(msgspec.Struct, tag=True):
    """A request ended. Empty `chains`: nothing was computed for it, only forget it.

    `prefill`: as in Prepare; the request may have been the first to measure it. `output_tokens`: of
    the answer.
    """

    request_id: str
    chains: list[list[Key]]
    num_tokens: int
    prefill: PrefillCost | None = None
    output_tokens: Tokens = 0


EngineMessage = Hello | Prepare | Lookup | Load | Release | Store | Commit | Discard | Finish
AgentMessage = Welcome | Refused | Inventory | Found | Landed | Loaded | Stored

_encoder = msgspec.msgpack.Encoder()
_engine_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(EngineMessage)
_agent_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AgentMessage)


def pack(message: EngineMessage | AgentMessage) -> bytes:
    """The message as it goes on the socket, length in front."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def body_size(length: bytes | bytearray) -> int:
    """The size of the body that follows these 4 bytes.

    Raises:
        LinkError: larger than any message may be.
    """
    (size,) = LENGTH.unpack(length)
    if size > MAX_MESSAGE_BYTES:
        raise LinkError(f"a message of {size} bytes exceeds the bound of {MAX_MESSAGE_BYTES}")
    return int(size)


def unpack_engine(body: bytes | bytearray | memoryview) -> EngineMessage:
    """A message from an engine. Raises LinkError when it is none."""
    return _unpack(_engine_decoder, body)  # type: ignore[no-any-return]


def unpack_agent(body: bytes | bytearray | memoryview) -> AgentMessage:
    """A message from the agent. Raises LinkError when it is none."""
    return _unpack(_agent_decoder, body)  # type: ignore[no-any-return]


def _unpack(decoder: msgspec.msgpack.Decoder[Any], body: bytes | bytearray | memoryview) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise LinkError(f"malformed message: {error}") from error
