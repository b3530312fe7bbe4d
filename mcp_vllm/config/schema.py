"""Every setting of mcp_vllm, with its default, its bounds and its meaning.

This is the one place where a key is declared: docs/configuration.md is generated from it. Values
are frozen; a process reads its configuration once and hands it down.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from mcp_vllm.config import loader
from mcp_vllm.config.address import Address
from mcp_vllm.config.nearest import did_you_mean

KNOWN_CODECS = ("raw", "zstd", "lossless")

_MIB = 1 << 20
_GIB = 1 << 30
_MAX_BYTES = 1 << 50


def _listen_address(text: str) -> str:
    return str(Address.parse(text))


def _peer_address(text: str) -> str:
    address = Address.parse(text)
    if address.port == 0:
        raise ValueError(f'"{text}" needs the port that the peer listens on, not 0')
    return str(address)


def _unique(addresses: tuple[str, ...]) -> tuple[str, ...]:
    for index, address in enumerate(addresses):
        if address in addresses[:index]:
            raise ValueError(f'"{address}" is listed twice')
    return addresses


def _known_codec(name: str) -> str:
    if name not in KNOWN_CODECS:
        raise ValueError(f'unknown codec "{name}" {did_you_mean(name, KNOWN_CODECS)}')
    return name


ListenAddress = Annotated[str, AfterValidator(_listen_address)]
PeerAddress = Annotated[str, AfterValidator(_peer_address)]
CodecName = Annotated[str, AfterValidator(_known_codec)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True
    )


class AgentConfig(_Section):
    """The context agent: the process that stores blocks and talks to peers."""

    socket: Path | None = None
    """Unix socket of an agent that runs on its own (`mcp-vllm agent`). Unset: the connector
    starts an agent and supervises it."""

    listen: ListenAddress = "127.0.0.1:7077"
    """HOST:PORT on which the agent serves its peers. Port 0 takes any free one."""

    ram_bytes: ByteSize = Field(default=ByteSize(4 * _GIB), ge=_MIB, le=_MAX_BYTES)
    """Memory that the store of compressed blocks may use."""

    landing_bytes: ByteSize = Field(default=ByteSize(64 * _MIB), ge=_MIB, le=_MAX_BYTES)
    """Shared memory through which fetched blocks enter an engine."""

    codec_threads: int = Field(default=0, ge=0, le=64)
    """Threads that compress and decompress. 0: one less than the cores, at least 1."""

    max_sessions: int = Field(default=10_000, ge=1, le=10_000_000)
    """Session manifests kept; the least recently used leave first."""

    lookup_ms: int = Field(default=50, ge=1, le=60_000)
    """How long a request may wait to learn who has its blocks; after that it is a miss."""

    stall_ms: int = Field(default=1_000, ge=10, le=600_000)
    """A transfer that brings no byte for this long is given up."""

    load_ms: int = Field(default=10_000, ge=10, le=3_600_000)
    """How long a whole load may take before the request is recomputed instead."""


class CodecConfig(_Section):
    """How blocks are compressed, in the store and on the wire."""

    name: CodecName = "lossless"
    """Codec for new blocks: `raw`, `zstd` or `lossless`. Every codec can be read at any time."""

    level: int = Field(default=3, ge=1, le=22)
    """Zstandard level; 3 to 5 recommended, higher costs more time than it saves on most links."""


class Config(_Section):
    """The configuration of one engine and its agent."""

    version: Literal[1] = 1
    """Version of this file format."""

    host_cache_bytes: ByteSize = Field(default=ByteSize(_GIB), ge=_MIB, le=_MAX_BYTES)
    """The engine's host cache: shared memory for uncompressed blocks (vLLM's primary tier)."""

    peers: Annotated[tuple[PeerAddress, ...], AfterValidator(_unique)] = Field(
        default=(), max_length=256
    )
    """HOST:PORT of other hosts' agents, asked for blocks that are not held here."""

    insecure: bool = False
    """Serve peers on a non-loopback address without TLS."""

    agent: AgentConfig = AgentConfig()
    codec: CodecConfig = CodecConfig()

    @model_validator(mode="after")
    def _loopback_unless_insecure(self) -> "Config":
        listen = self.agent.listen
        if not self.insecure and not Address.parse(listen).is_loopback:
            # The key tells the loader which source to name; a whole-model fault has none itself.
            raise PydanticCustomError(
                "plain_listen",
                "{listen} can be reached from other machines and has no TLS: "
                'set "insecure: true" to allow that, or let "agent.listen" be a loopback address',
                {"key": "agent.listen", "listen": listen},
            )
        return self

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, object] | None = None,
        *,
        peers: Sequence[str] = (),
        environ: Mapping[str, str] = os.environ,
    ) -> "Config":
        """Merge flags, environment, `source` and defaults, in this order of precedence.

        `source` is the path of a YAML or JSON file, JSON text that starts with "{", a mapping, or
        None; `peers` comes from the command line. Raises ConfigError, one line for each fault.
        """
        return loader.load(cls, source, flags=loader.peer_flags(peers), environ=environ).config

    def to_json(self) -> str:
        """Every key as JSON text, for a child process; `from_json` is its inverse."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Read what `to_json` wrote, without looking at the environment. Raises ConfigError."""
        return loader.load(cls, text, flags={}, environ={}).config
