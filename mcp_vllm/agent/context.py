"""What the parts of an agent share: its configuration, store, sessions, metrics and codec pool."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from mcp_vllm.agent.chains import SavedPrefill
from mcp_vllm.agent.codecs import AgentCodecs
from mcp_vllm.agent.disk import open_disk, policy_file
from mcp_vllm.agent.flights import Flights
from mcp_vllm.agent.load_record import LoadRecord
from mcp_vllm.agent.pins import SessionPins
from mcp_vllm.agent.reader import Reader
from mcp_vllm.agent.shared_store import open_shared
from mcp_vllm.cache_folder import cache_root
from mcp_vllm.config import Config
from mcp_vllm.link.prefill import PrefillCost
from mcp_vllm.link.protocol import GroupLayout
from mcp_vllm.security.seals import Seals
from mcp_vllm.session.fingerprint import Fingerprint
from mcp_vllm.session.manifest import Manifest, SessionRegistry
from mcp_vllm.store.chunk_policy import ChunkPolicy
from mcp_vllm.store.ram import ChunkKey, RamStore
from mcp_vllm.store.tiers import Held, Tiers, seal_id_of
from mcp_vllm.telemetry.agent_metrics import AgentMetrics

T = TypeVar("T")

# Engines of that many kinds are remembered, the latest to connect last.
MAX_NAMESPACES = 256


@dataclass
class Activity:
    """Whether engines are at work, so that encoding can wait until they are not."""

    busy_requests: int = 0
    idle_since_s: float = field(default_factory=time.monotonic)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def begin(self) -> None:
        self.busy_requests += 1

    def end(self) -> None:
        self.busy_requests -= 1
        if self.busy_requests == 0:
            self.idle_since_s = time.monotonic()
        self.changed.set()

    def idle_for_s(self) -> float:
        """Seconds since the last request of any engine ended; 0 while one is under way."""
        return 0.0 if self.busy_requests else time.monotonic() - self.idle_since_s


class AgentContext:
    """Owned by the agent's event loop; only the pool's functions run elsewhere.

    Attributes:
        store: the chunks in memory; `tiers` those on disk too.
        seals: what opens and seals frames; the agent's security sets it before anything is served.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.agent_id = uuid.uuid4().hex[:12]
        tenants = config.tenants
        # What computing costs this host's engines, by namespace, as they measured it.
        self.prefills: dict[bytes, PrefillCost] = {}
        # What a chunk is, by namespace and then by group.
        self.groups: dict[bytes, Sequence[GroupLayout]] = {}
        saved_prefill = SavedPrefill(self.prefills, self.groups)
        disk = open_disk(config.agent.disk, tenants, saved_prefill.ms_of)
        policy = ChunkPolicy(
            config.agent.ram_bytes,
            quota_of=tenants.ram_bytes_of,
            named=[quota.tenant for quota in tenants.quotas],
            saved_ms_of=saved_prefill.ms_of,
            file=policy_file(config.agent.disk, "memory") if disk is not None else None,
        )
        self.store = RamStore(config.agent.ram_bytes, policy)
        shared = open_shared(config.agent, self._may_lie_outside)
        self.tiers = Tiers(self.store, disk, shared)
        self.sessions = SessionRegistry(config.agent.max_sessions, tenants.sessions_of)
        self.seals = Seals()
        self.metrics = AgentMetrics()
        self.activity = Activity()
        self.flights = Flights()
        self.pins = SessionPins(self.store, self.names_of)
        self.fingerprints: dict[bytes, Fingerprint] = {}
        self.store_record = LoadRecord()
        self.disk_record = LoadRecord()
        self.shared_record = LoadRecord()
        threads = config.agent.codec_threads or max(1, (os.cpu_count() or 1) - 1)
        self.codec_threads = threads
        self.codecs = AgentCodecs(config.codec, threads, cache_root())
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mcp-codec")

    async def in_pool(self, function: Callable[..., T], *args: object) -> T:
        """Run codec work or a large copy outside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def reader(self, tenant: str, lossy: Sequence[str] = ()) -> Reader:
        """Who reads as `tenant`: its own chunks, and those of the tenants that are shared."""
        shared = (each for each in self.config.tenants.shared if each != tenant)
        tenants = (tenant, *shared)
        return Reader(tenants, lossy, tuple(self.seals.key_ids(each) for each in tenants))

    def readable(self, reader: Reader, namespace: bytes, key: bytes) -> ChunkKey | None:
        """The chunk of that key which an engine here can be given; None: a miss."""
        for name in reader.names(namespace, key):
            if self.is_readable(name):
                return name
        return None

    def readable_flags(self, reader: Reader, namespace: bytes, keys: Sequence[bytes]) -> bytearray:
        """For each key 1 where `readable` finds something: the same, for many keys at once."""
        flags, reach, opens = bytearray(len(keys)), self.tiers.reach, self.seals.opens_key
        for tenant in reader.tenants:
            for index, key in enumerate(keys):
                if flags[index]:
                    continue
                held = reach(ChunkKey(namespace, key, tenant))
                if held is not None:
                    seal_id = seal_id_of(held)
                    flags[index] = not seal_id or opens(tenant, seal_id)
        return flags

    def is_readable(self, name: ChunkKey) -> bool:
        """Whether the chunk is here or was found in the shared store, and opens."""
        held = self.tiers.reach(name)
        return held is not None and self.seals.opens_key(name.tenant, seal_id_of(held))

    def _may_lie_outside(self, name: ChunkKey, seal_id: str) -> bool:
        """Whether the chunk may lie in the shared store as it is: a tenant's that has a key here
        only sealed."""
        return bool(seal_id) or not self.seals.key_ids(name.tenant)

    def sealed_by(self, name: ChunkKey, held: Held) -> str:
        """The id of the key that its frame is, or will be, sealed with; empty: not sealed."""
        return seal_id_of(held) or next(iter(self.seals.key_ids(name.tenant)), "")

    def names_of(self, manifest: Manifest, keys: Sequence[bytes] | None = None) -> list[ChunkKey]:
        """The session's chunks (all, or those of `keys`, in that order) under the names that they
        have here: its tenant's own, or a shared one."""
        reader = self.reader(manifest.key.tenant)
        tiers, namespace = self.tiers, manifest.namespace
        return [
            next(
                (name for name in reader.names(namespace, key) if name in tiers),
                reader.own(namespace, key),
            )
            for key in (manifest.chunk_keys() if keys is None else keys)
        ]

    def held(self, manifest: Manifest) -> dict[ChunkKey, Held]:
        """The session's chunks that are here, in memory or on disk."""
        chunks = {name: self.tiers.find(name) for name in self.names_of(manifest)}
        return {name: chunk for name, chunk in chunks.items() if chunk is not None}

    def appear(self, manifest: Manifest) -> None:
        """A session that came from elsewhere is here now; its parents are younger than children."""
        for chain in manifest.chains:
            self.tiers.touch(self.names_of(manifest, chain))
        self.sessions.put(manifest)

    def learn_engine(self, fingerprint: Fingerprint, groups: Sequence[GroupLayout]) -> bytes:
        """Remember an engine's fingerprint as the latest; returns its namespace."""
        self.codecs.learn_engine(fingerprint.digest, fingerprint, groups)
        self.fingerprints.pop(fingerprint.digest, None)
        self.fingerprints[fingerprint.digest] = fingerprint
        self.groups[fingerprint.digest] = groups
        while len(self.fingerprints) > MAX_NAMESPACES:
            oldest = next(iter(self.fingerprints))
            del self.fingerprints[oldest]
            self.groups.pop(oldest, None)
            self.codecs.forget_engine(oldest)
            self.prefills.pop(oldest, None)
        return fingerprint.digest

    def close(self) -> None:
        self.codecs.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
