"""Where a load's chunks come from, as the cost model sees it: our store, or a peer.

Made anew for each decision; what was learned is in the `LoadRecord` behind it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.load_record import LoadRecord
from mcp_vllm.agent.peer import Peer
from mcp_vllm.agent.reader import Reader
from mcp_vllm.codec.chooser import CodecCost

# Until codecs were measured, and for chunks that only have to be copied; raw bytes a second.
ASSUMED_DECODE_BYTES_S = 300e6
COPY_BYTES_S = 1e9
# Of a disk, until loads from it were measured: raw bytes a second, reading and decoding.
ASSUMED_DISK_BYTES_S = 200e6
# Of a shared store, likewise: a link of 1 Gbit/s.
ASSUMED_SHARED_BYTES_S = 100e6
# What was not confirmed for so long is tried again, within the slack.
STALE_S = 60.0


@dataclass(eq=False)
class StoreSource:
    """Chunks of our store, of one form and in one tier."""

    bytes_s: float
    record: LoadRecord

    def modelled_s(self, raw_bytes: int, num_chunks: int) -> float:
        return raw_bytes * (1 + 1 / num_chunks) / self.bytes_s

    def seconds(self, raw_bytes: int, num_chunks: int) -> float:
        return self.record.factor * self.modelled_s(raw_bytes, num_chunks)

    @property
    def is_sure(self) -> bool:
        return _is_fresh(self.record.confirmed_s)

    @property
    def last_s(self) -> float:
        return 0.0


@dataclass(eq=False)
class PeerSource:
    """Chunks that a peer would send, in the best of the codecs in `costs`."""

    peer: Peer
    costs: Mapping[str, CodecCost]

    @property
    def record(self) -> LoadRecord:
        return self.peer.plan.record

    def modelled_s(self, raw_bytes: int, num_chunks: int) -> float:
        return self.peer.plan.seconds(raw_bytes, num_chunks, self.costs)

    def seconds(self, raw_bytes: int, num_chunks: int) -> float:
        return self.record.factor * self.modelled_s(raw_bytes, num_chunks)

    @property
    def is_sure(self) -> bool:
        """Whether the link was measured lately, and not assumed."""
        return self.peer.plan.meter.is_sure

    @property
    def last_s(self) -> float:
        """When something last came, on the monotonic clock."""
        return self.peer.plan.meter.last_s


LoadSource: TypeAlias = StoreSource | PeerSource


@dataclass
class SourcesOf:
    """The sources of one request's chunks, each made once.

    Args:
        holders: peers that have a key, the one that will be asked first in front.
        reader: on whose behalf.
    """

    context: AgentContext
    namespace: bytes
    holders: Mapping[bytes, Sequence[Peer]]
    reader: Reader
    _peers: dict[Peer, PeerSource] = field(default_factory=dict)

    def __post_init__(self) -> None:
        speeds = self.context.codecs.speeds(self.namespace)
        stored = speeds.get(self.context.config.codec.name)
        threads = self.context.codec_threads
        decode_bytes_s = stored.decode_bytes_s if stored else ASSUMED_DECODE_BYTES_S
        record = self.context.store_record
        self._frames = StoreSource(threads * decode_bytes_s, record)
        self._raw = StoreSource(COPY_BYTES_S, record)
        disk_bytes_s = min(ASSUMED_DISK_BYTES_S, self._frames.bytes_s)
        self._disk = StoreSource(disk_bytes_s, self.context.disk_record)
        shared_bytes_s = min(ASSUMED_SHARED_BYTES_S, self._frames.bytes_s)
        self._shared = StoreSource(shared_bytes_s, self.context.shared_record)

    def of(self, key: bytes) -> LoadSource | None:
        """Where the chunk would come from; None where nobody has it."""
        name = self.context.readable(self.reader, self.namespace, key)
        if name is not None:
            chunk = self.context.store.get(name)
            if chunk is None:
                return self._disk if name in self.context.tiers else self._shared
            return self._frames if chunk.raw is None else self._raw
        peers = self.holders.get(key)
        if not peers:
            return None
        source = self._peers.get(peers[0])
        if source is None:
            peer, lossy = peers[0], self.reader.lossy
            source = self._peers[peer] = peer_source(self.context, peer, self.namespace, lossy)
        return source


def peer_source(
    context: AgentContext, peer: Peer, namespace: bytes, lossy: Sequence[str]
) -> PeerSource:
    """The peer as a source of such chunks, for one who accepts those lossy tiers."""
    accepted = context.codecs.acceptable(lossy)
    speeds = context.codecs.speeds(namespace)
    return PeerSource(peer, peer.plan.costs(accepted, speeds, context.codec_threads))


def _is_fresh(at_s: float) -> bool:
    return at_s > 0 and time.monotonic() - at_s < STALE_S
