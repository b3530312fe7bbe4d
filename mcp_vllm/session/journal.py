"""The sessions of an agent in one file, so that the next agent has them: a line of changes.

Every change is appended as a record: 4 bytes "MCPR", 1 kind (1 the manifest is now this, 0 it is
gone), 4 size of the body, 8 xxh3_64 of kind and body, and the body: the manifest, or the session's
key, as msgpack; little-endian. When the file is full it is written anew beside the old one, which
it then replaces. Records that are damaged or not whole are skipped. Used by one thread.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import xxhash

from mcp_vllm.session.archive import ArchiveError, decode_manifest, encode_manifest
from mcp_vllm.session.manifest import Manifest, SessionKey

_RECORD = struct.Struct("<4sBIQ")
_MAGIC = b"MCPR"
_GONE, _PRESENT = 0, 1


class SessionJournal:
    """See the module's docstring.

    Args:
        max_bytes: of the file and the one that replaces it together.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._new_path = path.with_suffix(".new")
        self._max_file_bytes = max_bytes // 2
        self._end = -1

    def load(self) -> list[Manifest]:
        """The manifests, the one changed last at the end. Raises OSError."""
        self._new_path.unlink(missing_ok=True)
        content = b""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            content = file.read(self._max_file_bytes + 1)
        found: dict[SessionKey, Manifest] = {}
        for change in _changes(content):
            key = change.key if isinstance(change, Manifest) else change
            found.pop(key, None)
            if isinstance(change, Manifest):
                found[key] = change
        return list(found.values())

    def append(self, changes: Iterable[Manifest | SessionKey]) -> bool:
        """Note what sessions are now, or that they are gone; False when it must be rewritten.

        Raises:
            OSError: nothing was noted.
        """
        body = b"".join(map(_record, changes))
        if self._end < 0 or self._end + len(body) > self._max_file_bytes:
            return False
        fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            _write_all(fd, body, self._end)
        except OSError:
            os.ftruncate(fd, self._end)
            raise
        finally:
            os.close(fd)
        self._end += len(body)
        return True

    def rewrite(self, manifests: Iterable[Manifest]) -> None:
        """Replace the file's content by these, the least recently used first; half of its room
        stays free, and the first ones are left out for that. Raises OSError."""
        records = [_record(manifest) for manifest in manifests]
        room = self._max_file_bytes // 2
        kept = len(records)
        while kept and room >= len(records[kept - 1]):
            kept -= 1
            room -= len(records[kept])
        body = b"".join(records[kept:])
        self._end = -1
        try:
            fd = os.open(
                self._new_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
            )
            try:
                _write_all(fd, body, 0)
                os.fdatasync(fd)
            finally:
                os.close(fd)
            os.replace(self._new_path, self._path)
        finally:
            self._new_path.unlink(missing_ok=True)
        self._end = len(body)


def _record(change: Manifest | SessionKey) -> bytes:
    if isinstance(change, Manifest):
        kind, body = _PRESENT, encode_manifest(change)
    else:
        kind, body = _GONE, msgspec.msgpack.encode(change)
    return _RECORD.pack(_MAGIC, kind, len(body), _checksum(kind, body)) + body


def _changes(content: bytes) -> Iterator[Manifest | SessionKey]:
    at = content.find(_MAGIC)
    while at >= 0:
        change, size = _read(content, at)
        if change is not None:
            yield change
        at = content.find(_MAGIC, at + size)


def _read(content: bytes, at: int) -> tuple[Manifest | SessionKey | None, int]:
    """The change that begins there, and its size; None: what is there is no whole record."""
    if len(content) - at < _RECORD.size:
        return None, 1
    _, kind, size, checksum = _RECORD.unpack_from(content, at)
    body = content[at + _RECORD.size : at + _RECORD.size + size]
    if len(body) != size or _checksum(kind, body) != checksum:
        return None, 1
    try:
        if kind == _PRESENT:
            return decode_manifest(body), _RECORD.size + size
        return msgspec.msgpack.decode(body, type=SessionKey), _RECORD.size + size
    except (ArchiveError, msgspec.MsgspecError, UnicodeDecodeError):
        return None, 1


def _checksum(kind: int, body: bytes) -> int:
    return xxhash.xxh3_64_intdigest(bytes([kind]) + body)


def _write_all(fd: int, body: bytes, offset: int) -> None:
    view = memoryview(body)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
