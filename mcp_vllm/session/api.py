"""The structures of the session API (docs/api.md), shared by the agent and its clients."""

from __future__ import annotations

from typing import Annotated

import msgspec

from mcp_vllm.session.manifest import MAX_NAME_CHARS

MAX_TTL_S = 365 * 24 * 3600.0
# The route of one session.
ONE = "/v1/sessions/{tenant}/{session_id}"
# Why blocks are kept.
SESSION_CACHE = f"{ONE}/cache"
BLOCK_CACHE = "/v1/blocks/{tenant}/{key}/cache"
# Sessions on one page of a list.
MAX_PAGE = 1000
ARCHIVE_TYPE = "application/vnd.mcp-vllm.session"

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]


class TransferRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`to`: one of the agent's peers, "HOST:PORT" as configured."""

    to: Name


class ForkRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`new_id`: of the new session, of the same tenant."""

    new_id: Name


class PinRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`ttl_s`: seconds from now."""

    ttl_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_TTL_S)]


class SessionHolder(msgspec.Struct):
    """A peer that says it has the session, and how far it is there."""

    peer: str
    turns: int
    num_tokens: int


class SessionSummary(msgspec.Struct):
    """A session. Sizes in bytes; times in seconds since the epoch, by the agent's clock.

    Attributes:
        namespace: digest of the engines' fingerprint that its chunks belong to, hexadecimal.
        loss: "none", or the worst lossy tier that it went through.
        num_chunks: of its chains, `held_chunks` of which are in memory there; of a model with
            sliding windows only the last windows are kept.
        raw_bytes: of the held chunks in an engine; `held_bytes`: as they are held.
        pinned_until_s: None when it is not pinned.
        replica: it lives at a peer; this is a copy in case that peer is lost.
        holders: peers that have the session too, as announced: the furthest first.
    """

    tenant: str
    session_id: str
    namespace: str
    num_tokens: int
    turns: int
    loss: str
    parked: bool
    created_s: float
    last_used_s: float
    num_chunks: int
    held_chunks: int
    raw_bytes: int
    held_bytes: int
    pinned_until_s: float | None
    holders: list[SessionHolder] = []
    replica: bool = False


class SessionList(msgspec.Struct, omit_defaults=True):
    """A page of sessions, by name. `next`: what to give as `after` for the next page; missing where
    this is the last."""

    sessions: list[SessionSummary]
    next: str | None = None


class UploadState(msgspec.Struct):
    """`received`: the bytes of an import that broke off which need not be sent again."""

    received: int


class PlacementRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A prompt whose blocks are known, by vLLM's hashes of them.

    Attributes:
        namespace: of its engine, hexadecimal, as sessions have it.
        keys: offload keys, hexadecimal: the block's hash and the KV cache group as 4 bytes; each
            group's in order of position.
        num_tokens: of the prompt; 0: as many as the blocks hold.
    """

    tenant: Name
    namespace: Annotated[str, msgspec.Meta(max_length=128)]
    keys: Annotated[
        list[Annotated[str, msgspec.Meta(max_length=256)]], msgspec.Meta(max_length=8192)
    ]
    num_tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 30)] = 0


class Placement(msgspec.Struct):
    """What going on with a context at one agent's engines takes.

    Attributes:
        agent: "HOST:PORT" of a peer as configured; empty: the agent that was asked.
        held_chunks: of the context, there; `held_tokens` from its beginning, of `num_tokens`.
        cost_s: seconds until the whole context is there: what is worth loading loaded from where
            it is, the rest computed. `recompute_s`: to compute all of it.
    """

    agent: str
    held_chunks: int
    held_tokens: int
    num_tokens: int
    cost_s: float
    recompute_s: float


class Placements(msgspec.Struct):
    """The cheapest first. Empty: no engine of that kind has connected to this agent."""

    placements: list[Placement]


class Transfer(msgspec.Struct):
    """What a transfer took: chunks of the session, how many of them travelled, their bytes."""

    num_chunks: int
    num_sent: int
    raw_bytes: int
    wire_bytes: int


class DrainStep(msgspec.Struct):
    """One session of a drain, `done` of `total`: where it went, or why it stays."""

    tenant: str
    session_id: str
    done: int
    total: int
    to: str = ""
    error: str = ""


class Failure(msgspec.Struct):
    """The body of every answer that says no."""

    error: str
