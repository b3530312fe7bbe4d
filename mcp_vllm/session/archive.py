"""A session in one portable file: its manifest and the frames of its chunks, checksummed.

All integers are little-endian::

    "MCPS", uint8 version
    uint32 size of the manifest, the manifest as msgpack
    for each chunk: uint64 size of its frame (not 0), uint8 rank of its loss (codec.loss), the frame
    uint64 0
    32 bytes BLAKE3 of everything before

A chunk that several groups of the chain name is there once. Each frame carries its own checksums,
so a reader may use what is whole before the end; the digest says that nothing is missing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
from blake3 import blake3

from mcp_vllm.codec.loss import LOSSES
from mcp_vllm.errors import McpError
from mcp_vllm.session.manifest import FORMAT_VERSION, Manifest, checked_name

MAGIC = b"MCPS"
VERSION = 1
MAX_MANIFEST_BYTES = 64 << 20
MAX_FRAME_BYTES = 1 << 30
MAX_KEY_BYTES = 128
DIGEST_BYTES = 32

_START = struct.Struct("<4sBI")
_FRAME = struct.Struct("<QB")


class ArchiveError(McpError):
    """What should be a session archive is none, is damaged, or ends too early."""


@dataclass(frozen=True)
class ArchivedFrame:
    """One chunk: its frame, and what its content had been through before (`codec.loss`)."""

    frame: bytes
    loss: str


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as msgpack."""
    return msgspec.msgpack.encode(manifest)


def decode_manifest(body: bytes) -> Manifest:
    """The inverse of `encode_manifest`, for bytes from anywhere. Raises ArchiveError."""
    try:
        manifest = msgspec.msgpack.decode(body, type=Manifest)
        checked_name("tenant", manifest.key.tenant)
        checked_name("session id", manifest.key.session_id)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, McpError) as error:
        raise ArchiveError(f"malformed manifest: {error}") from error
    if manifest.version != FORMAT_VERSION:
        raise ArchiveError(f"manifest of version {manifest.version}, not {FORMAT_VERSION}")
    if any(not 4 < len(key) <= MAX_KEY_BYTES for chain in manifest.chains for key in chain):
        raise ArchiveError("malformed manifest: a key of impossible length")
    if any(len(set(chain)) != len(chain) for chain in manifest.chains):
        raise ArchiveError("malformed manifest: a chain that has a key twice")
    if manifest.loss not in LOSSES or manifest.num_tokens < 0 or manifest.turns < 0:
        raise ArchiveError("malformed manifest: a value outside its range")
    return manifest


class ArchiveWriter:
    """Gives the file piece by piece: `start`, `add` for each chunk, `end`."""

    def __init__(self) -> None:
        self._digest = blake3()

    def start(self, manifest: Manifest) -> bytes:
        body = encode_manifest(manifest)
        if len(body) > MAX_MANIFEST_BYTES:
            raise ArchiveError(f"a manifest of {len(body)} bytes is too large for an archive")
        return self._passed(_START.pack(MAGIC, VERSION, len(body)) + body)

    def add(self, chunk: ArchivedFrame) -> Iterator[bytes]:
        """Two pieces: a head and the frame itself."""
        yield self._passed(_FRAME.pack(len(chunk.frame), LOSSES.index(chunk.loss)))
        yield self._passed(chunk.frame)

    def end(self) -> bytes:
        last = self._passed(_FRAME.pack(0, 0))
        return last + self._digest.digest()

    def _passed(self, piece: bytes) -> bytes:
        self._digest.update(piece)
        return piece


class ArchiveReader:
    """Takes the file piece by piece, of any sizes, and gives what is whole.

    Attributes:
        manifest: None until it has come.
        complete: the end was there and its digest right.
    """

    def __init__(self) -> None:
        self.manifest: Manifest | None = None
        self.complete = False
        self._digest = blake3()
        self._pending = bytearray()

    def feed(self, piece: bytes) -> Iterator[ArchivedFrame]:
        """The frames that became whole. Raises ArchiveError at the first thing that is wrong."""
        self._pending += piece
        if self.complete and self._pending:
            raise ArchiveError("bytes after the end of the archive")
        if self.manifest is None and not self._take_start():
            return
        while not self.complete and len(self._pending) >= _FRAME.size:
            size, loss_rank = _FRAME.unpack_from(self._pending)
            if size == 0:
                if not self._take_end():
                    return
            elif size > MAX_FRAME_BYTES or loss_rank >= len(LOSSES):
                raise ArchiveError("the archive is damaged: an impossible frame")
            elif len(self._pending) < _FRAME.size + size:
                return
            else:
                body = self._take(_FRAME.size + size)
                yield ArchivedFrame(body[_FRAME.size :], LOSSES[loss_rank])

    def forget_unfinished(self) -> int:
        """Throw away what has come of a frame that is not whole; returns how many bytes."""
        num_bytes = len(self._pending)
        self._pending.clear()
        return num_bytes

    def close(self) -> None:
        """There is no more. Raises ArchiveError unless the archive is complete."""
        if not self.complete:
            raise ArchiveError("the archive ends too early")

    def _take_start(self) -> bool:
        if len(self._pending) < _START.size:
            return False
        magic, version, size = _START.unpack_from(self._pending)
        if magic != MAGIC:
            raise ArchiveError("not a session archive")
        if version != VERSION:
            raise ArchiveError(f"an archive of version {version}, not {VERSION}")
        if size > MAX_MANIFEST_BYTES:
            raise ArchiveError(f"the archive claims a manifest of {size} bytes")
        if len(self._pending) < _START.size + size:
            return False
        self.manifest = decode_manifest(self._take(_START.size + size)[_START.size :])
        return True

    def _take_end(self) -> bool:
        if len(self._pending) < _FRAME.size + DIGEST_BYTES:
            return False
        self._take(_FRAME.size)
        if bytes(self._pending) != self._digest.digest():
            raise ArchiveError("the archive is damaged: its digest is another, or bytes follow it")
        self._pending.clear()
        self.complete = True
        return True

    def _take(self, size: int) -> bytes:
        taken = bytes(self._pending[:size])
        del self._pending[:size]
        self._digest.update(taken)
        return taken
