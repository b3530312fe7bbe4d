"""The agent's use of its disk: opening the tier, and keeping the sessions there.

Owned by the agent's event loop. A disk that cannot be used is said once, in the log and in the
health; the agent then works as one without a disk.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mcp_vllm.config import DiskConfig, TenantsConfig
from mcp_vllm.session.journal import SessionJournal
from mcp_vllm.session.manifest import Manifest, SessionKey, SessionRegistry
from mcp_vllm.store.chunk_policy import ChunkPolicy, PolicyFile, SavedMs
from mcp_vllm.store.disk import DiskError, DiskStore, DiskTier

logger = logging.getLogger(__name__)

JOURNAL_NAME = "sessions.journal"
# Of agent.disk.bytes, for the sessions.
JOURNAL_SHARE = 16
# And for what a policy learned: its file, and the one that is to replace it.
POLICY_SHARE = 64
MIN_POLICY_BYTES = 2 << 20
NUM_POLICY_FILES = 4


def policy_file(config: DiskConfig, tier: str) -> PolicyFile | None:
    """Where that tier's policy is kept; None: nowhere."""
    if config.path is None:
        return None
    return PolicyFile(config.path / f"{tier}.policy", _policy_bytes(config))


def _policy_bytes(config: DiskConfig) -> int:
    return max(config.bytes // POLICY_SHARE, MIN_POLICY_BYTES)


def open_disk(config: DiskConfig, tenants: TenantsConfig, saved_ms_of: SavedMs) -> DiskTier | None:
    """The tier that is configured; None: none is, or it cannot be used."""
    if config.path is None:
        return None

    def policy(budget_bytes: int) -> ChunkPolicy:
        return ChunkPolicy(
            budget_bytes,
            quota_of=tenants.disk_bytes_of,
            named=[quota.tenant for quota in tenants.quotas],
            saved_ms_of=saved_ms_of,
            file=policy_file(config, "disk"),
        )

    others = config.bytes // JOURNAL_SHARE + NUM_POLICY_FILES * _policy_bytes(config)
    try:
        return DiskTier(DiskStore(config.path, config.bytes - others, policy=policy))
    except DiskError as error:
        logger.error("agent.disk.path: %s; going on without it", error)
        return None


class KeptSessions:
    """The registry's manifests on disk: read once, then every change is written.

    Args:
        folder: where the disk tier is, which holds the lock for both.
        max_bytes: that they may take there.
    """

    def __init__(self, folder: Path, max_bytes: int, sessions: SessionRegistry) -> None:
        self._journal = SessionJournal(folder / JOURNAL_NAME, max_bytes)
        self._folder = folder
        self._sessions = sessions
        self._changes: dict[SessionKey, Manifest | SessionKey] = {}
        self._writer: asyncio.Task[None] | None = None
        self._is_failing = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mcp-sessions")

    def restore(self) -> None:
        """Bring back the sessions that were here (those that are parked have files of their own),
        and write every change from now on. Before anything is served."""
        try:
            manifests = self._journal.load()
        except OSError as error:
            logger.error("the sessions in %s cannot be read: %s", self._folder, error)
            manifests = []
        for manifest in manifests:
            if not manifest.parked:
                self._sessions.put(manifest)
        self._sessions.watchers.append(self._changed)

    async def flush(self) -> bool:
        """Write what has not been written yet; whether that worked."""
        while self._writer is not None and (self._changes or not self._writer.done()):
            await asyncio.gather(self._writer, return_exceptions=True)
        return not self._is_failing

    async def close(self) -> None:
        """Write what has not been written yet."""
        if self._writer is not None:
            await asyncio.gather(self._writer, return_exceptions=True)
        await self._write()
        self._pool.shutdown()

    def _changed(self, key: SessionKey, manifest: Manifest | None) -> None:
        self._changes.pop(key, None)
        self._changes[key] = manifest or key
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while self._changes:
            changes, self._changes = self._changes, {}
            try:
                if not await loop.run_in_executor(
                    self._pool, self._journal.append, list(changes.values())
                ):
                    manifests = list(self._sessions)
                    await loop.run_in_executor(self._pool, self._journal.rewrite, manifests)
            except OSError as error:
                if not self._is_failing:
                    logger.warning(
                        "sessions cannot be written to %s (%s): the next agent may lack their "
                        "newest turns",
                        self._folder,
                        error.strerror,
                    )
                self._is_failing = True
            else:
                self._is_failing = False
