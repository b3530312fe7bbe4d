"""Every metric of the context agent, in one place; served at `/metrics`."""

from __future__ import annotations

import contextlib

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mcp_vllm.store.disk import DiskTier
from mcp_vllm.store.shared import SharedTier

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
RATIOS = (0.25, 0.5, 0.75, 0.8, 0.9, 1, 1.1, 1.25, 1.33, 2, 4)


class AgentMetrics:
    """The agent's metrics; names start with `mcp_agent_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.engines = Gauge("mcp_agent_engines", "Engines connected", registry=r)
        self.sessions = Gauge("mcp_agent_sessions", "Session manifests kept", registry=r)
        self.chunks = Gauge("mcp_agent_chunks", "Chunks held in memory", registry=r)
        self.held_bytes = Gauge(
            "mcp_agent_held_bytes", "Bytes of chunks held in memory, overhead included", registry=r
        )
        self.evictions = Gauge(
            "mcp_agent_evictions", "Chunks evicted from memory since the start", registry=r
        )
        self.lookup_keys = Counter(
            "mcp_agent_lookup_keys",
            "Keys looked up by engines, by where they were found",
            ["result"],
            registry=r,
        )
        self.lookup_seconds = Histogram(
            "mcp_agent_lookup_seconds",
            "Duration of an engine's lookup",
            buckets=SECONDS,
            registry=r,
        )
        self.loaded_chunks = Counter(
            "mcp_agent_loaded_chunks",
            "Chunks brought to an engine, by source",
            ["source"],
            registry=r,
        )
        self.failed_chunks = Counter(
            "mcp_agent_failed_chunks",
            "Chunks asked for by an engine that could not be brought, by cause",
            ["cause"],
            registry=r,
        )
        self.load_seconds = Histogram(
            "mcp_agent_load_seconds", "Duration of an engine's load", buckets=SECONDS, registry=r
        )
        self.load_decisions = Counter(
            "mcp_agent_load_decisions",
            "Contexts of which something could be loaded, by what was chosen",
            ["choice"],
            registry=r,
        )
        self.loads_given_up = Counter(
            "mcp_agent_loads_given_up",
            "Loads that were ended because computing the rest was quicker",
            registry=r,
        )
        self.load_prediction = Histogram(
            "mcp_agent_load_prediction_ratio",
            "Predicted over actual duration of a load, by source",
            ["source"],
            buckets=RATIOS,
            registry=r,
        )
        self.saved_seconds = Counter(
            "mcp_agent_saved_seconds",
            "Seconds that loads took less than computing would have",
            registry=r,
        )
        self.lost_seconds = Counter(
            "mcp_agent_lost_seconds",
            "Seconds that loads, those given up included, took more than computing would have",
            registry=r,
        )
        self.wire_received_bytes = Counter(
            "mcp_agent_wire_received_bytes", "Frame bytes received from peers", ["peer"], registry=r
        )
        self.wire_sent_bytes = Counter(
            "mcp_agent_wire_sent_bytes", "Frame bytes sent to peers", registry=r
        )
        self.sent_chunks = Counter("mcp_agent_sent_chunks", "Chunks sent to peers", registry=r)
        self.stored_chunks = Counter(
            "mcp_agent_stored_chunks", "Chunks taken over from engines", registry=r
        )
        self.stored_raw_bytes = Counter(
            "mcp_agent_stored_raw_bytes", "Bytes of chunks taken over from engines", registry=r
        )
        self.encoded_raw_bytes = Counter(
            "mcp_agent_encoded_raw_bytes", "Bytes of chunks encoded, before", registry=r
        )
        self.encoded_frame_bytes = Counter(
            "mcp_agent_encoded_frame_bytes", "Bytes of chunks encoded, after", registry=r
        )
        self.peer_failures = Counter(
            "mcp_agent_peer_failures",
            "Requests to a peer that failed, by cause",
            ["peer", "cause"],
            registry=r,
        )
        self.peer_up = Gauge(
            "mcp_agent_peer_up",
            "1 while the peer is asked, 0 while it is avoided",
            ["peer"],
            registry=r,
        )
        self.directory_synced = Gauge(
            "mcp_agent_directory_synced",
            "1 while the peer's directory is known here and lookups need not ask the peer",
            ["peer"],
            registry=r,
        )
        self.directory_chunks = Gauge(
            "mcp_agent_directory_chunks",
            "Chunks noted of the peer's directory",
            ["peer"],
            registry=r,
        )
        self.directory_resyncs = Counter(
            "mcp_agent_directory_resyncs",
            "Times that a peer's directory was thrown away, by cause",
            ["peer", "cause"],
            registry=r,
        )
        self.discovery_failures = Counter(
            "mcp_agent_discovery_failures",
            "Times that peers could not be looked for, by source",
            ["source"],
            registry=r,
        )
        self.replications = Counter(
            "mcp_agent_replications",
            "Copies of sessions for peers, by what came of them",
            ["result"],
            registry=r,
        )
        self.replicated_bytes = Counter(
            "mcp_agent_replicated_bytes", "Frame bytes that copies of sessions took", registry=r
        )
        self.replication_queued = Gauge(
            "mcp_agent_replication_queued", "Sessions that wait to be copied to peers", registry=r
        )
        self.replication_short = Gauge(
            "mcp_agent_replication_short",
            "Sessions that had fewer copies than configured when they were looked through last",
            registry=r,
        )
        self.peer_lookups = Counter(
            "mcp_agent_peer_lookups",
            "Lookups in peers, by who answered: their directory here, or they over the network",
            ["by"],
            registry=r,
        )
        self.quota_evictions = Counter(
            "mcp_agent_quota_evictions",
            "What left because its tenant had more than its quota, by kind",
            ["tenant", "kind"],
            registry=r,
        )
        self.tenant_held_bytes = Gauge(
            "mcp_agent_tenant_held_bytes",
            "Bytes of chunks held in memory for a tenant with a quota of its own",
            ["tenant"],
            registry=r,
        )
        self.disk_bytes = Gauge(
            "mcp_agent_disk_bytes", "Bytes of all files of the disk tier", registry=r
        )
        self.disk_chunks = Gauge("mcp_agent_disk_chunks", "Chunks held on disk", registry=r)
        self.disk_full = Gauge(
            "mcp_agent_disk_full", "1 while nothing can be written to the disk, else 0", registry=r
        )
        self.disk_queued_bytes = Gauge(
            "mcp_agent_disk_queued_bytes", "Bytes of chunks that wait to be written", registry=r
        )
        self.disk_reads = Gauge(
            "mcp_agent_disk_reads", "Chunks read from disk since the start", registry=r
        )
        self.disk_writes = Gauge(
            "mcp_agent_disk_writes", "Chunks written to disk since the start", registry=r
        )
        self.disk_drops = Gauge(
            "mcp_agent_disk_drops",
            "Chunks not written to disk since the start, by cause",
            ["cause"],
            registry=r,
        )
        self.disk_damaged = Gauge(
            "mcp_agent_disk_damaged", "Chunks found damaged on disk since the start", registry=r
        )
        self.disk_compactions = Gauge(
            "mcp_agent_disk_compactions", "Segments rewritten since the start", registry=r
        )
        self.shared_up = Gauge(
            "mcp_agent_shared_up", "1 while the shared store answers, else 0", registry=r
        )
        self.shared_queued_bytes = Gauge(
            "mcp_agent_shared_queued_bytes",
            "Bytes of chunks that wait to be written to the shared store",
            registry=r,
        )
        self.shared_events = Gauge(
            "mcp_agent_shared_events",
            "What became of chunks at the shared store since the start",
            ["event"],
            registry=r,
        )
        self.shared_drops = Gauge(
            "mcp_agent_shared_drops",
            "Chunks not written to the shared store since the start, by cause",
            ["cause"],
            registry=r,
        )
        self.fingerprint_mismatches = Counter(
            "mcp_agent_fingerprint_mismatches",
            "Lookups that a peer could not serve because its engines differ from ours, by field",
            ["peer", "field"],
            registry=r,
        )

    def forget_peer(self, name: str) -> None:
        """The peer is no member any more: series of addresses that come and go must not pile up."""
        for metric, others in (
            (self.peer_up, ()),
            (self.directory_synced, ()),
            (self.directory_chunks, ()),
            (self.wire_received_bytes, ()),
            (self.directory_resyncs, ("cause",)),
            (self.peer_failures, ("cause",)),
            (self.fingerprint_mismatches, ("field",)),
        ):
            _remove(metric, name, others)

    def set_disk(self, disk: DiskTier) -> None:
        """What the disk tier counts itself, as of now."""
        size = disk.size()
        self.disk_bytes.set(size.file_bytes)
        self.disk_chunks.set(size.num_chunks)
        self.disk_full.set(size.is_full)
        self.disk_queued_bytes.set(disk.queued_bytes)
        self.disk_reads.set(disk.frames_read)
        self.disk_writes.set(disk.frames_written)
        self.disk_damaged.set(disk.damaged)
        self.disk_compactions.set(disk.compactions)
        for cause, count in disk.drops.items():
            self.disk_drops.labels(cause).set(count)

    def set_shared(self, shared: SharedTier) -> None:
        """What the shared tier counts itself, as of now."""
        self.shared_up.set(shared.is_up)
        self.shared_queued_bytes.set(shared.queued_bytes)
        for event in ("hits", "misses", "reads", "writes", "damaged", "failures"):
            self.shared_events.labels(event).set(getattr(shared, event))
        for cause, count in shared.drops.items():
            self.shared_drops.labels(cause).set(count)

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def _remove(metric: Counter | Gauge, peer: str, others: tuple[str, ...]) -> None:
    """Drop every series of that peer; `others` are its labels after `peer`."""
    of_peer = {
        tuple(sample.labels[label] for label in others)
        for family in metric.collect()
        for sample in family.samples
        if sample.labels.get("peer") == peer
    }
    for values in of_peer:
        with contextlib.suppress(KeyError):
            metric.remove(peer, *values)
