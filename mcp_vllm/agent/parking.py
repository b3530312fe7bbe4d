"""Parked sessions: each an archive in a folder, there whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec

from mcp_vllm.session.archive import ArchiveError, ArchiveReader
from mcp_vllm.session.manifest import Manifest, SessionKey

logger = logging.getLogger(__name__)

SUFFIX = ".mcps"
PIECE_BYTES = 1 << 20


class ParkingFolder:
    """The folder; created when the first session is parked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def write(self, key: SessionKey, pieces: AsyncIterator[bytes]) -> None:
        """Write an archive; it appears under its name once it is whole and on the disk."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(key)
        unfinished = path.with_suffix(".part")
        try:
            with unfinished.open("wb") as file:
                async for piece in pieces:
                    await asyncio.to_thread(file.write, piece)
                await asyncio.to_thread(_sync, file.fileno())
            os.replace(unfinished, path)
        finally:
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
