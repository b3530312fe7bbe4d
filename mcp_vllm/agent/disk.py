"""The agent's use of its disk: opening the tier, and keeping the sessions there.

Owned by the agent's event loop. A disk that cannot be used is said once, in the log and in the
health; the agent then works as one without a disk.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mcp_vllm.config import DiskConfig
from mcp_vllm.session.journal import SessionJournal
from mcp_vllm.session.manifest import Manifest, SessionKey, SessionRegistry
from mcp_vllm.store.disk import DiskError, DiskStore, DiskTier

logger = logging.getLogger(__name__)

JOURNAL_NAME = "sessions.journal"
# Of agent.disk.bytes, for the sessions.
JOURNAL_SHARE = 16


def open_disk(config: DiskConfig) -> DiskTier | None:
    """The tier that is configured; None: none is, or it cannot be used."""
    if config.path is None:
        return None
    try:
        return DiskTier(DiskStore(config.path, config.bytes - config.bytes // JOURNAL_SHARE))
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
