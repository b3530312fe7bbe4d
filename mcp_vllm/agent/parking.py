"""Parked sessions: each an archive in a folder, there whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec

from mcp_vllm.errors import McpError
from mcp_vllm.session.archive import ArchiveError, ArchiveReader
from mcp_vllm.session.manifest import Manifest, SessionKey

logger = logging.getLogger(__name__)

SUFFIX = ".mcps"
PIECE_BYTES = 1 << 20


class ParkingFull(McpError):
    """The file would be more than may be parked."""


class ParkingFolder:
    """The folder; created when the first session is parked.

    Args:
        max_bytes: of all files.
        quota_of: bytes of a tenant's files, 0 for no quota.
    """

    def __init__(
        self, folder: Path, max_bytes: int, quota_of: Callable[[str], int] = lambda tenant: 0
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._quota_of = quota_of
        # Bytes of the files that are there, and of those being written.
        self._sizes: dict[SessionKey, int] = {}
        self._of_tenant: Counter[str] = Counter()
        self._written: Counter[SessionKey] = Counter()

    async def write(self, key: SessionKey, pieces: AsyncIterator[bytes]) -> None:
        """Write an archive; it appears under its name once it is whole and on the disk.

        Raises:
            ParkingFull: it would be too much; nothing is left of it.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(key)
        unfinished = path.with_suffix(".part")
        try:
            with unfinished.open("wb") as file:
                async for piece in pieces:
                    self._written[key] += len(piece)
                    self._check_room(key)
                    await asyncio.to_thread(file.write, piece)
                await asyncio.to_thread(_sync, file.fileno())
            os.replace(unfinished, path)
            self._note(key, self._written[key])
        finally:
            del self._written[key]
            unfinished.unlink(missing_ok=True)
        _sync_folder(self._folder)

    async def read(self, key: SessionKey) -> AsyncIterator[bytes]:
        """The archive, piece by piece. Raises ArchiveError when it is gone."""
        try:
            file = self._path(key).open("rb")
        except OSError as error:
            raise ArchiveError(f"the parked session's file cannot be read: {error}") from error
        with file:
            while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                yield piece

    def remove(self, key: SessionKey) -> None:
        self._path(key).unlink(missing_ok=True)
        self._note(key, 0)

    def _check_room(self, key: SessionKey) -> None:
        """Whether what is written so far may be. Raises ParkingFull."""
        others = sum(self._sizes.values()) - self._sizes.get(key, 0)
        if others + sum(self._written.values()) > self._max_bytes:
            raise ParkingFull(f"parked sessions would take more than {self._max_bytes} bytes")
        quota = self._quota_of(key.tenant)
        writing = sum(n for each, n in self._written.items() if each.tenant == key.tenant)
        own = self._of_tenant[key.tenant] - self._sizes.get(key, 0)
        if quota and own + writing > quota:
            raise ParkingFull(f"the tenant's parked sessions would take more than {quota} bytes")

    def _note(self, key: SessionKey, size: int) -> None:
        """The file of that session has that size now; 0: there is none."""
        self._of_tenant[key.tenant] += size - self._sizes.pop(key, 0)
        if size:
            self._sizes[key] = size
        if not self._of_tenant[key.tenant]:
            del self._of_tenant[key.tenant]

    def manifests(self) -> Iterator[Manifest]:
        """What is parked there, as manifests without chains; files that are damaged are named in
        the log and left alone, unfinished ones are removed."""
        for unfinished in self._folder.glob("*.part"):
            unfinished.unlink(missing_ok=True)
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            try:
                manifest = _manifest_of(path)
            except (ArchiveError, OSError) as error:
                logger.warning("%s is no parked session: %s", path, error)
                continue
            if path == self._path(manifest.key):
                self._note(manifest.key, path.stat().st_size)
                yield msgspec.structs.replace(manifest, parked=True, chains=[])
            else:
                logger.warning("%s holds a session of another name: left alone", path)

    def _path(self, key: SessionKey) -> Path:
        # A digest: a name may hold any printable text, a file name may not.
        text = f"{len(key.tenant)}:{key.tenant}{key.session_id}".encode()
        return self._folder / (hashlib.blake2b(text, digest_size=16).hexdigest() + SUFFIX)


def _manifest_of(path: Path) -> Manifest:
    reader = ArchiveReader()
    with path.open("rb") as file:
        while reader.manifest is None and (piece := file.read(PIECE_BYTES)):
            for _ in reader.feed(piece):
                break
    if reader.manifest is None:
        raise ArchiveError("the file ends before its manifest does")
    return reader.manifest


def _sync(fd: int) -> None:
    os.fsync(fd)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
