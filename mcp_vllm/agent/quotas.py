"""Tells operators what left because its tenant had too much: metrics at once, an audit line for
each tenant every few seconds, however much leaves."""

from __future__ import annotations

import asyncio
from collections import Counter

from mcp_vllm.config import TenantsConfig
from mcp_vllm.security.audit import Audit
from mcp_vllm.session.manifest import Manifest, SessionRegistry
from mcp_vllm.store.ram import ChunkKey, RamStore
from mcp_vllm.telemetry.agent_metrics import AgentMetrics

REPORT_S = 5.0
# Tenants without a quota of their own, so that nobody can make up any number of labels.
OTHERS = "(other)"


class QuotaReports:
    """One per agent, owned by its event loop; `close` writes what is left to say."""

    def __init__(
        self,
        config: TenantsConfig,
        store: RamStore,
        sessions: SessionRegistry,
        metrics: AgentMetrics,
        audit: Audit,
    ) -> None:
        self._named = {quota.tenant for quota in config.quotas}
        self._store, self._metrics, self._audit = store, metrics, audit
        self._chunks: Counter[str] = Counter()
        self._sessions: Counter[str] = Counter()
        self._due: asyncio.TimerHandle | None = None
        store.over_quota.append(self._chunk_left)
        sessions.over_quota.append(self._session_left)

    def refresh(self) -> None:
        """Set the gauges of the tenants that have a quota of their own."""
        for tenant in self._named:
            held_bytes = self._store.tenants.held_bytes(tenant)
            self._metrics.tenant_held_bytes.labels(tenant).set(held_bytes)

    def close(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._report()

    def _chunk_left(self, name: ChunkKey) -> None:
        self._count(self._chunks, name.tenant, "chunk")

    def _session_left(self, manifest: Manifest) -> None:
        self._count(self._sessions, manifest.key.tenant, "session")

    def _count(self, counter: Counter[str], tenant: str, kind: str) -> None:
        counter[tenant] += 1
        label = tenant if tenant in self._named else OTHERS
        self._metrics.quota_evictions.labels(label, kind).inc()
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(REPORT_S, self._report)

    def _report(self) -> None:
        self._due = None
        for tenant in self._chunks.keys() | self._sessions.keys():
            self._audit.record(
                "quota",
                operation="evict",
                tenant=tenant,
                chunks=self._chunks[tenant],
                sessions=self._sessions[tenant],
            )
        self._chunks.clear()
        self._sessions.clear()
