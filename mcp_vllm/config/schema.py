"""Every setting of mcp_vllm, with its default, its bounds and its meaning.

This is the one place where a key is declared: docs/configuration.md is generated from it. Values
are frozen; a process reads its configuration once and hands it down.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, ByteSize, Field, model_validator
from pydantic_core import PydanticCustomError

from mcp_vllm.config import loader
from mcp_vllm.config.address import Address
from mcp_vllm.config.section import (
    AUTO,
    LOSSY_TIERS,
    CodecName,
    ListenAddress,
    LossyTier,
    PeerAddress,
    RedisUrl,
    Section,
    WireCodecName,
    unique,
)

_MIB = 1 << 20
_GIB = 1 << 30
_MAX_BYTES = 1 << 50


class DiskConfig(Section):
    """The disk tier: what memory has no room for, and what the agent has again after its end."""

    path: Path | None = None
    """Folder for blocks and sessions; an agent each. Unset: nothing is kept on disk."""

    bytes: ByteSize = Field(default=ByteSize(16 * _GIB), ge=64 * _MIB, le=_MAX_BYTES)
    """All that the files there may take."""


class SharedStoreConfig(Section):
    """A store that many hosts share, below memory and disk: a Redis or Valkey server. Blocks are
    found there by any agent that uses the same server; who may use it may read and replace what is
    not sealed (`security.seal_keys`)."""

    url: RedisUrl | None = None
    """`redis://HOST:PORT/DB`, or `rediss://` for TLS. Unset: no shared store. Needs
    `mcp-vllm[redis]`."""

    password_file: Path | None = None
    """File with the server's password."""

    ttl_s: int = Field(default=86_400, ge=0, le=10 * 365 * 86_400)
    """Seconds that a block stays after its last use; 0: until the server evicts it
    (`maxmemory-policy`)."""

    max_frame_bytes: ByteSize = Field(default=ByteSize(16 * _MIB), ge=64 << 10, le=256 * _MIB)
    """Larger blocks, as compressed, are neither written there nor read from there."""

    queue_bytes: ByteSize = Field(default=ByteSize(64 * _MIB), ge=_MIB, le=_MAX_BYTES)
    """Memory for blocks that wait to be written; what finds no room is not written."""


class AgentConfig(Section):
    """The context agent: the process that stores blocks and talks to peers."""

    socket: Path | None = None
    """Unix socket of an agent that runs on its own (`mcp-vllm agent`). Unset: the connector
    starts an agent and supervises it."""

    listen: ListenAddress = "127.0.0.1:7077"
    """HOST:PORT on which the agent serves its peers. Port 0 takes any free one."""

    ram_bytes: ByteSize = Field(default=ByteSize(4 * _GIB), ge=_MIB, le=_MAX_BYTES)
    """Memory that the store of compressed blocks may use."""

    disk: DiskConfig = DiskConfig()

    shared: SharedStoreConfig = SharedStoreConfig()

    landing_bytes: ByteSize = Field(default=ByteSize(64 * _MIB), ge=_MIB, le=_MAX_BYTES)
    """Shared memory through which fetched blocks enter an engine."""

    directory_bytes: ByteSize = Field(default=ByteSize(64 * _MIB), ge=_MIB, le=_MAX_BYTES)
    """Memory for what peers say they have, in equal shares. A peer with more chunks than its share
    can hold (18 bytes each) is asked by lookups."""

    codec_threads: int = Field(default=0, ge=0, le=64)
    """Threads that compress and decompress. 0: one less than the cores, at least 1."""

    max_sessions: int = Field(default=10_000, ge=1, le=10_000_000)
    """Session manifests kept; the least recently used leave first."""

    parking_folder: Path | None = None
    """Folder for parked sessions; needed to park any. They survive the agent's end."""

    parking_bytes: ByteSize = Field(default=ByteSize(64 * _GIB), ge=_MIB, le=_MAX_BYTES)
    """All that the files of parked sessions may take; what would exceed it is not parked."""

    lookup_ms: int = Field(default=50, ge=1, le=60_000)
    """How long a request may wait to learn who has its blocks; after that it is a miss."""

    stall_ms: int = Field(default=1_000, ge=10, le=600_000)
    """A transfer that brings no byte for this long is given up."""

    load_ms: int = Field(default=10_000, ge=10, le=3_600_000)
    """How long a whole load may take before the request is recomputed instead."""

    load_policy: Literal["faster", "always"] = "faster"
    """Blocks that were found are loaded where that is `faster` than computing them, as measured, or
    `always`: to spare the engine's processor."""


class CodecConfig(Section):
    """How blocks are compressed, in the store and on the wire."""

    name: CodecName = "lossless"
    """Codec for new blocks: `raw`, `zstd` or `lossless`. Every codec can be read at any time."""

    level: int = Field(default=3, ge=1, le=22)
    """Zstandard level; 3 to 5 recommended, higher costs more time than it saves on most links."""

    wire: WireCodecName = AUTO
    """Codec in which blocks are asked for from peers. `auto`: the one that brings them soonest over
    the link as measured, of those without loss and those that `lossy` allows."""

    lossy: Annotated[tuple[LossyTier, ...], AfterValidator(unique)] = ()
    """Lossy tiers that may be used between peers: `near-lossless`, `balanced`, `small`. Blocks that
    went through one are given only to those who allow it too."""

    lossy_tenants: Annotated[tuple[str, ...], AfterValidator(unique)] = Field(
        default=(), max_length=10_000
    )
    """Tenants that `lossy` is for; empty: for all. With tenants named, it holds for their requests
    with a `cache_salt`: without one, blocks are shared with the other tenants by their content."""

    calibration: Path | None = None
    """What `mcp-vllm codec calibrate` wrote, for `balanced` and `small`. Unset: it is looked for in
    the cache folder, by the model's weights."""

    def lossy_for(self, tenant: str, salted: bool) -> tuple[str, ...]:
        """The lossy tiers that a request of `tenant` accepts."""
        everybody = not self.lossy_tenants
        return self.lossy if everybody or (salted and tenant in self.lossy_tenants) else ()


class DiscoveryConfig(Section):
    """Peers that are found while serving, beside those in `peers`; they may come and go."""

    dns: Annotated[tuple[PeerAddress, ...], AfterValidator(unique)] = Field(
        default=(), max_length=16
    )
    """NAME:PORT whose addresses are all peers (A and AAAA), as of a Kubernetes headless service.
    With TLS, their certificates must bear NAME."""

    dns_s: int = Field(default=5, ge=1, le=3600)
    """How often names are resolved again, in seconds."""

    registry: RedisUrl | None = None
    """`redis://HOST:PORT/DB`, or `rediss://` for TLS: a Redis or Valkey server where agents write
    their addresses and find the others'. Needs `mcp-vllm[redis]`."""

    registry_password_file: Path | None = None
    """File with the password for the registry."""

    registry_ttl_s: int = Field(default=12, ge=2, le=3600)
    """An agent that the registry has not heard of for so long is no member any more, in seconds."""

    group: str = Field(default="default", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Agents of one group in a registry are peers."""

    advertise: PeerAddress | None = None
    """HOST:PORT that is written into the registry; unset: `agent.listen`."""

    @property
    def is_set(self) -> bool:
        return bool(self.dns) or self.registry is not None


class ReplicationConfig(Section):
    """Copies of each session at peers, made after its turns, so that a host that is lost takes no
    context with it."""

    replicas: int = Field(default=0, ge=0, le=16)
    """Peers that keep a copy of each session that lives here. 0: none."""

    bytes_s: ByteSize = Field(default=ByteSize(32 * _MIB), ge=64 << 10, le=_MAX_BYTES)
    """Bytes a second that all copies together may take of the network."""

    queue: int = Field(default=1_000, ge=1, le=1_000_000)
    """Sessions that may wait to be copied. What finds no room is copied later: at its next turn, or
    when all sessions are looked through, every 10 s."""


class TenantQuota(Section):
    """What one tenant may have at most, in place of what every tenant may."""

    tenant: str = Field(min_length=1, max_length=256)
    """Whose quota it is."""

    ram_bytes: ByteSize = Field(default=ByteSize(0), ge=0, le=_MAX_BYTES)
    """Memory for its blocks; 0: no quota."""

    disk_bytes: ByteSize = Field(default=ByteSize(0), ge=0, le=_MAX_BYTES)
    """Disk for its blocks; 0: no quota."""

    sessions: int = Field(default=0, ge=0, le=10_000_000)
    """Its sessions; 0: no quota."""

    parked_bytes: ByteSize = Field(default=ByteSize(0), ge=0, le=_MAX_BYTES)
    """Files of its parked sessions; 0: no quota."""


def _one_quota_each(quotas: tuple[TenantQuota, ...]) -> tuple[TenantQuota, ...]:
    unique(tuple(quota.tenant for quota in quotas))
    return quotas


class TenantsConfig(Section):
    """Tenants of one agent: what they share, and how much each may have. Blocks are found by their
    content inside a tenant only. Over a quota, the tenant's own leave: the blocks that promise
    least, the sessions used longest ago."""

    shared: Annotated[tuple[str, ...], AfterValidator(unique)] = Field(default=(), max_length=32)
    """Tenants whose blocks every tenant may use, for system prompts: what a request of such a
    tenant computes is there for all. The same on all hosts."""

    ram_bytes: ByteSize = Field(default=ByteSize(0), ge=0, le=_MAX_BYTES)
    """Memory that the blocks of a tenant may take; 0: no quota."""

    disk_bytes: ByteSize = Field(default=ByteSize(0), ge=0, le=_MAX_BYTES)
    """Disk that the blocks of a tenant may take; 0: no quota."""

    sessions: int = Field(default=0, ge=0, le=10_000_000)
    """Sessions that a tenant may have; 0: no quota."""

    parked_bytes: ByteSize = Field(default=ByteSize(0), ge=0, le=_MAX_BYTES)
    """Files of parked sessions that a tenant may have; what would exceed it is not parked. 0: no
    quota."""

    quotas: Annotated[tuple[TenantQuota, ...], AfterValidator(_one_quota_each)] = Field(
        default=(), max_length=10_000
    )
    """Tenants with other quotas: a list of `{tenant, ram_bytes, disk_bytes, sessions,
    parked_bytes}`."""

    @cached_property
    def _by_tenant(self) -> dict[str, TenantQuota]:
        return {quota.tenant: quota for quota in self.quotas}

    def ram_bytes_of(self, tenant: str) -> int:
        """The bytes that its blocks may take; 0: no quota."""
        quota = self._by_tenant.get(tenant)
        return int(self.ram_bytes if quota is None else quota.ram_bytes)

    def disk_bytes_of(self, tenant: str) -> int:
        """The bytes that its blocks may take on disk; 0: no quota."""
        quota = self._by_tenant.get(tenant)
        return int(self.disk_bytes if quota is None else quota.disk_bytes)

    def sessions_of(self, tenant: str) -> int:
        """The sessions that it may have; 0: no quota."""
        quota = self._by_tenant.get(tenant)
        return self.sessions if quota is None else quota.sessions

    def parked_bytes_of(self, tenant: str) -> int:
        """The bytes that files of its parked sessions may take; 0: no quota."""
        quota = self._by_tenant.get(tenant)
        return int(self.parked_bytes if quota is None else quota.parked_bytes)


class TlsConfig(Section):
    """PEM files of this process; all three, or none. Replaced files are used within seconds."""

    certificate: Path | None = None
    """Certificate of this host, with intermediate ones after it; for both sides of a connection."""

    key: Path | None = None
    """Its private key, without a password."""

    ca: Path | None = None
    """CA that signed the certificates of all agents: a CA of your own, never a public one."""

    @property
    def is_set(self) -> bool:
        return self.certificate is not None

    @model_validator(mode="after")
    def _all_or_none(self) -> "TlsConfig":
        given = [each is not None for each in (self.certificate, self.key, self.ca)]
        if any(given) and not all(given):
            raise PydanticCustomError(
                "tls_files", 'needs "certificate", "key" and "ca" together', {"key": "security.tls"}
            )
        return self


class SecurityConfig(Section):
    """Who may reach the agent. With `tls` or `token_keys`, every request must say who asks."""

    tls: TlsConfig = TlsConfig()

    token_keys: Path | None = None
    """YAML or JSON file of the keys that sign bearer tokens. Unset: no tokens, and a certificate of
    the CA may do everything; set: a certificate alone may only read blocks."""

    audience: str = Field(default="mcp-vllm", min_length=1, max_length=256)
    """The `aud` that a token must name."""

    clock_skew_s: int = Field(default=30, ge=0, le=600)
    """By how much the clocks of those who make tokens may differ from ours."""

    own_token_file: Path | None = None
    """File with the bearer token that this agent presents to its peers, beside its certificate."""

    seal_keys: Path | None = None
    """YAML or JSON file of the keys that blocks are sealed with, for each tenant that has one. They
    leave this agent sealed, and are sealed on its disks."""

    audit_file: Path | None = None
    """File for one JSON line for each session operation, export of blocks and refusal."""


class Config(Section):
    """The configuration of one engine and its agent."""

    version: Literal[1] = 1
    """Version of this file format."""

    host_cache_bytes: ByteSize = Field(default=ByteSize(_GIB), ge=_MIB, le=_MAX_BYTES)
    """The engine's host cache: shared memory for uncompressed blocks (vLLM's primary tier)."""

    host_cache_policy: Literal["smart", "lru"] = "smart"
    """What leaves the host cache first: what promises least (`smart`: SmartCache), or what was used
    longest ago (`lru`: vLLM's own)."""

    short_polls: bool = True
    """Where vLLM computes on the CPU, let its processes sleep a millisecond after a message. They
    would poll for the next one for a second, on cores that compute."""

    peers: Annotated[tuple[PeerAddress, ...], AfterValidator(unique)] = Field(
        default=(), max_length=256
    )
    """HOST:PORT of other hosts' agents, asked for blocks that are not held here."""

    insecure: bool = False
    """Serve peers on a non-loopback address without TLS, and send them tokens without it."""

    discovery: DiscoveryConfig = DiscoveryConfig()
    replication: ReplicationConfig = ReplicationConfig()
    agent: AgentConfig = AgentConfig()
    codec: CodecConfig = CodecConfig()
    tenants: TenantsConfig = TenantsConfig()
    security: SecurityConfig = SecurityConfig()

    @model_validator(mode="after")
    def _loopback_unless_secure(self) -> "Config":
        listen = self.agent.listen
        secure = self.insecure or self.security.tls.is_set
        if not secure and not Address.parse(listen).is_loopback:
            # The key tells the loader which source to name; a whole-model fault has none itself.
            raise PydanticCustomError(
                "plain_listen",
                "{listen} can be reached from other machines and has no TLS: "
                'set "security.tls" (certificate, key, ca), or "insecure: true" to allow that, '
                'or let "agent.listen" be a loopback address',
                {"key": "agent.listen", "listen": listen},
            )
        return self

    @model_validator(mode="after")
    def _own_token_stays_secret(self) -> "Config":
        plain = self.security.own_token_file is not None and not self.security.tls.is_set
        far = [peer for peer in self.peers if not Address.parse(peer).is_loopback]
        if self.discovery.is_set:
            far.append("peers that are discovered")
        if plain and far and not self.insecure:
            raise PydanticCustomError(
                "plain_token",
                'the token would travel to {peer} in the clear: set "security.tls", '
                'or "insecure: true" to allow that',
                {"key": "security.own_token_file", "peer": far[0]},
            )
        return self

    @model_validator(mode="after")
    def _shared_store_is_not_overheard(self) -> "Config":
        url = urlsplit(self.agent.shared.url or "rediss://localhost")
        near = Address(url.hostname or "", 0).is_loopback
        if url.scheme == "redis" and not near and not self.insecure:
            raise PydanticCustomError(
                "plain_shared_store",
                'blocks would travel to {host} in the clear: use "rediss://", '
                'or "insecure: true" to allow that',
                {"key": "agent.shared.url", "host": url.hostname},
            )
        return self

    @model_validator(mode="after")
    def _advertises_an_address(self) -> "Config":
        everywhere = Address.parse(self.agent.listen).host in ("0.0.0.0", "::")
        if self.discovery.registry is not None and self.discovery.advertise is None and everywhere:
            raise PydanticCustomError(
                "no_address",
                "the registry needs the address at which peers reach this agent, and "
                "{listen} is none: set it to HOST:PORT",
                {"key": "discovery.advertise", "listen": self.agent.listen},
            )
        return self

    @model_validator(mode="after")
    def _wire_codec_is_allowed(self) -> "Config":
        wire = self.codec.wire
        if wire in LOSSY_TIERS and wire not in self.codec.lossy:
            raise PydanticCustomError(
                "lossy_wire",
                'codec "{wire}" loses detail: allow it with "codec.lossy: [{wire}]"',
                {"key": "codec.wire", "wire": wire},
            )
        return self

    @property
    def seeks_peers(self) -> bool:
        """Whether there may be peers, now or later."""
        return bool(self.peers) or self.discovery.is_set

    @property
    def seeks_elsewhere(self) -> bool:
        """Whether there may be peers, now or later, or a shared store."""
        return self.seeks_peers or self.agent.shared.url is not None

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
