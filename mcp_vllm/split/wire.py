"""The protocol between an engine (the client) and a stage (the server), and its messages.

One TCP connection, in TLS where configured, is one lease: KV blocks and request states of one
engine, which end with it. Every message is a header, metadata (msgpack) and a payload of raw
tensor bytes, each possibly empty:

    magic "MCPS" | version u8 | type u8 | flags u16 = 0 | metadata bytes u32 | payload bytes u64 |
    step u64                                                            (big endian, 28 bytes)

Life of a connection (> from the engine, < from the stage):

    > Hello      who asks, what it serves, how large its batches are
    < Welcome    the lease's attention layers, the memory for their KV blocks; or Error and the end
    > KvInit     the KV groups and the number of blocks, the same on both sides
    < Ok         for a client: with a KvPlan
    > Step n     a scrubbed scheduler output: what changes and what runs
    > Acts n     the order of the requests in the batch, and their activations
    < Reply n    the activations after the stage's layers, in the same order, and what it took
      ...        Step of nothing to run has neither Acts nor Reply
    > ReadKv     names of the lease's layers, and block ids
    < Kv         their pages, [layer, block, byte]
    > WriteKv    the same names and ids, and pages
    < Ok
    > Bye        or just the end of the connection

ReadKv and WriteKv may come after KvInit at any time but between Acts and Reply.

A Hello that says `measuring` is for planning: the lease is an ordinary one, its rows are made up,
and each Reply says what each layer took.

A Hello that says `is_client` is of a program without vLLM (split/client.py). It plays an engine's
scheduler, and leaves to the stage what needs vLLM: its KvInit is empty, the stage plans the groups
and blocks of its own layers, and Ok carries that KvPlan.

Steps are numbered from 1, and Acts and Reply carry their step's number: any other is an error.
At any time each side may send Ping, which is answered by Pong at once; during a step and while the
stage still loads, after some hundredths of a second at most. Where an engine and its stage
have the same cores, each says Soon when Acts or Reply follow within a moment, and the other one
wakes. After Error nothing follows.

What a step says of requests: aliases (numbers that mean nothing elsewhere), lengths, block ids and
counts. Token ids, text and sampling parameters have no field.

Bounds, checked before anything is allocated: metadata MAX_HELLO_BYTES until Welcome, then
MAX_METADATA_BYTES; a payload only where one is due, and then of exactly the length that follows
from the number of tokens and the form, or at most that where the form is `packed`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import msgspec

from mcp_vllm.split.errors import WireError

MAGIC = b"MCPS"
VERSION = 1
HEADER = struct.Struct("!4sBBHIQQ")
MAX_HELLO_BYTES = 64 << 10
MAX_METADATA_BYTES = 16 << 20
MAX_BATCH_TOKENS = 1 << 20
MAX_REQUESTS = 1 << 16
MAX_MODEL_LEN = 1 << 24
MAX_BLOCKS = 1 << 31
MAX_GROUPS = 64
MAX_WIDTH = 1 << 20
# Pages of KV in one message.
MAX_KV_BYTES = 32 << 20

# Why a stage refuses. `busy` passes; the others need somebody to change something.
REFUSALS = ("access", "model", "protocol", "memory", "busy", "step", "internal")


class Kind(IntEnum):
    HELLO = 1
    WELCOME = 2
    KV_INIT = 3
    OK = 4
    STEP = 5
    ACTS = 6
    REPLY = 7
    PING = 8
    PONG = 9
    ERROR = 10
    BYE = 11
    READ_KV = 12
    WRITE_KV = 13
    KV = 14
    SOON = 15


class Hello(msgspec.Struct, frozen=True):
    """The engine's first message.

    Attributes:
        token: a bearer token, where the stage wants one.
        facts: what must agree (model, weights, dtypes, block size), as names and values.
        max_model_len: tokens a request may have.
        max_requests: requests a step may have.
        max_tokens: tokens a step may have.
        form: of activations, one of activations.FORMS.
        dtype: of the activations, if it is not the stage's own; one of activations.DTYPES.
        layers: FIRST:END that the engine wants, some or all of the stage's; empty: all of them.
        is_client: has no vLLM. Facts that it leaves out need not agree; `max_model_len` is the most
            that it wants; Welcome has `about`, and Ok a KvPlan.
        measuring: wants times, not results: `facts` need not agree, Welcome has `about`, and each
            Reply says what each layer took.
        cores: a name of the cores that the engine has (same_cores.py); empty: it does not say.
    """

    facts: dict[str, str]
    max_model_len: int
    max_requests: int
    max_tokens: int
    form: str
    token: str | None = None
    measuring: bool = False
    layers: str = ""
    dtype: str = ""
    is_client: bool = False
    cores: str = ""


# A KV cache spec of vLLM: the name of its class, and its fields.
KvSpec = tuple[str, dict[str, int | bool | str | None]]


class About(msgspec.Struct, frozen=True):
    """A stage, for those who plan or have no vLLM.

    Attributes:
        layers: FIRST:END that it holds.
        memory_bytes: free before it loaded anything.
        dtypes: names of what its machine computes in natively.
    """

    layers: str
    machine: str
    memory_bytes: int
    dtypes: list[str]
    dtype: str


class StepSeconds(msgspec.Struct, frozen=True):
    """With each Reply: what the step took at the stage, from its activations' arrival to the
    answer, and of that each layer, if the lease measures."""

    total: float
    layers: list[float]


class Welcome(msgspec.Struct, frozen=True):
    """Attributes:
    kv_specs: of the lease's attention layers, by layer name.
    kv_bytes: memory for this lease's KV blocks.
    tensors: names of what goes from layer to layer: hidden_states, and residual if there is one.
    width: elements a token in each of them.
    layers: FIRST:END that the stage holds, of which the lease has those that Hello asks for.
    packing: how the stage's machine arranges KV pages, for engines that store them.
    shares_cores: the stage has the cores that Hello names, and takes turns with the engine on them.
    """

    kv_specs: dict[str, KvSpec]
    kv_bytes: int
    tensors: list[str]
    width: int
    layers: str
    about: About | None = None
    packing: str = ""
    shares_cores: bool = False


class KvGroup(msgspec.Struct, frozen=True):
    """One KV cache group as far as the stage is concerned; `layers` may be empty."""

    layers: list[str]
    spec: KvSpec
    layer_specs: dict[str, KvSpec] | None = None


class KvInit(msgspec.Struct, frozen=True):
    """Attributes:
    num_blocks: blocks of each group, the null block included.
    layout: name of vLLM's KV cache layout; None: what the stage's layers like best.
    hash_block_size, alignment: of the prefix cache, in tokens.
    """

    num_blocks: int
    layout: str | None
    groups: list[KvGroup]
    hash_block_size: int | None = None
    alignment: int | None = None


class KvPlan(msgspec.Struct, frozen=True):
    """What a stage has planned for a client.

    Attributes:
        num_blocks: blocks of each group, the null block included.
        block_tokens: tokens a block, by group.
        max_model_len: tokens a request may have.
    """

    num_blocks: int
    block_tokens: list[int]
    max_model_len: int


class NewRequest(msgspec.Struct, frozen=True, array_like=True):
    """A request that the stage has not seen under this alias; `blocks` are ids, a list a group."""

    alias: int
    prompt_len: int
    num_computed: int
    blocks: list[list[int]]


class Continued(msgspec.Struct, frozen=True, array_like=True):
    """A request that goes on; `blocks` are added to those it has, None: none."""

    alias: int
    num_computed: int
    blocks: list[list[int]] | None


class Step(msgspec.Struct, frozen=True, array_like=True):
    """Attributes:
    finished: aliases that end before the step.
    scheduled: aliases and their tokens in this step.
    zeroed: blocks to fill with zeros first.
    copies: pairs of blocks, copied from the first to the second after that.
    """

    finished: list[int]
    new: list[NewRequest]
    continued: list[Continued]
    scheduled: list[tuple[int, int]]
    zeroed: list[int]
    copies: list[tuple[int, int]]

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.scheduled)


class Acts(msgspec.Struct, frozen=True, array_like=True):
    """`order`: the aliases as their rows lie in the payload."""

    order: list[int]


class KvBlocks(msgspec.Struct, frozen=True, array_like=True):
    """Blocks of attention layers, of those with equally large pages; `blocks` are of each layer."""

    layers: list[str]
    blocks: list[int]


class Error(msgspec.Struct, frozen=True):
    code: str
    message: str


@dataclass(frozen=True)
class Header:
    kind: Kind
    metadata_bytes: int
    payload_bytes: int
    step: int


def pack_header(kind: Kind, metadata_bytes: int, payload_bytes: int, step: int) -> bytes:
    return HEADER.pack(MAGIC, VERSION, kind, 0, metadata_bytes, payload_bytes, step)


def unpack_header(
    header: bytes | bytearray, max_metadata: int, max_payload: int, max_kv_payload: int = 0
) -> Header:
    """Raises WireError: not ours, another version, or longer than allowed."""
    magic, version, kind, flags, metadata_bytes, payload_bytes, step = HEADER.unpack(header)
    if magic != MAGIC:
        raise WireError("the other side does not speak the protocol of stages")
    if version != VERSION or flags:
        raise WireError(f"protocol version {version}, ours is {VERSION}: upgrade the older side")
    try:
        kind = Kind(kind)
    except ValueError:
        raise WireError(f"unknown message type {kind}") from None
    if metadata_bytes > max_metadata:
        raise WireError(f"metadata of {metadata_bytes} bytes, allowed are {max_metadata}")
    most = max_kv_payload if kind in (Kind.WRITE_KV, Kind.KV) else max_payload
    if payload_bytes > most:
        raise WireError(f"payload of {payload_bytes} bytes, allowed are {most}")
    return Header(kind, metadata_bytes, payload_bytes, step)


M = TypeVar("M", bound=msgspec.Struct)


def decode(kind: type[M], metadata: bytes | bytearray | memoryview) -> M:
    """Raises WireError."""
    try:
        return msgspec.msgpack.decode(metadata, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise WireError(f"{kind.__name__}: {str(error)[:200]}") from None
