"""Sealed frames: what an agent stores, sends and parks of a tenant that has a key.

A frame is encrypted whole; in the clear stays what an agent without the key needs to keep it. All
integers are little-endian::

    4    magic, "MCPX"
    1    format version, 1
    1    codec id, 1 element type, 1 rank of the loss that the content has been through
    4    channels (ChunkLayout.channels)
    2    length K of the chunk's key, 2 zero
    8    raw size of the chunk
    8    size of all of this
    16   id of the sealing key, padded with zeros
    24   nonce
    K    key of the chunk
    ...  XAES-256-GCM of the frame: ciphertext and a tag of 16 bytes
    8    xxh3_64 of everything before, for those who cannot open it

Associated data: everything in front of the ciphertext, then the namespace and the tenant, each with
its length in front. So a sealed frame opens under the chunk key, engine fingerprint, tenant, format
version, key id and loss that it was sealed with, and under no other.

Nonces: 192 bits of BLAKE3, keyed with a key of its own, over everything that is sealed and bound.
Agents that share a key need no counter and no good random numbers, and a key no bound on frames:
two frames have one nonce only when they are the same frame of the same chunk, and then they become
the same bytes, so that an interrupted export goes on with what it began. That two sealed frames of
a chunk are equal is all that others learn; the chunk's key, which is in the clear, is a hash of its
content anyway.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import xxhash
from blake3 import blake3
from cryptography.exceptions import InvalidTag

from mcp_vllm.codec import (
    FRAME_PREFIX_SIZE,
    ChecksumError,
    ChunkLayout,
    FrameError,
    FrameHeader,
    read_header,
)
from mcp_vllm.codec.frame import MAX_KEY_SIZE
from mcp_vllm.codec.layout import ELEMENTS
from mcp_vllm.codec.loss import LOSSES, rank
from mcp_vllm.codec.registry import codec_name_of_id, is_lossless
from mcp_vllm.security import xaes
from mcp_vllm.security.file_stamp import Stamp
from mcp_vllm.security.seal_keys import SealKey, TenantKeys, read_seal_keys

MAGIC = b"MCPX"
VERSION = 1
_FIXED = struct.Struct("<4sBBBBIHHQQ16s24s")
_CHECKSUM_BYTES = 8
_KEY_ID = slice(32, 48)


class SealError(FrameError):
    """A sealed frame that does not open here, or a frame that should have been sealed."""


@dataclass(frozen=True)
class SealedHeader:
    """What a sealed frame says in the clear; the names are those of `FrameHeader`."""

    key: bytes
    raw_size: int
    frame_size: int
    codec_id: int
    layout: ChunkLayout
    loss: str
    key_id: str
    nonce: bytes

    @property
    def codec_name(self) -> str:
        return codec_name_of_id(self.codec_id)

    @property
    def lossless(self) -> bool:
        return is_lossless(self.codec_id)

    @property
    def size(self) -> int:
        return _FIXED.size + len(self.key)


def is_sealed(frame: bytes) -> bool:
    return frame[: len(MAGIC)] == MAGIC


def key_id_of(frame: bytes) -> str:
    """The id of the key that sealed it; empty for a frame that is not sealed."""
    return frame[_KEY_ID].rstrip(b"\0").decode("ascii", "replace") if is_sealed(frame) else ""


def read_sealed_header(frame: bytes, *, max_raw_size: int) -> SealedHeader:
    """Parse and check a whole sealed frame without opening it.

    Raises:
        FrameError: it contradicts itself or exceeds a bound; ChecksumError: it was damaged.
    """
    if len(frame) < _FIXED.size + _CHECKSUM_BYTES:
        raise FrameError(f"{len(frame)} bytes are too few for a sealed frame")
    (magic, version, codec_id, element, loss_rank, channels, key_size, zero, *rest) = (
        _FIXED.unpack_from(frame)
    )
    raw_size, size, key_id, nonce = rest
    if magic != MAGIC or version != VERSION:
        raise FrameError(f"not a sealed frame of version {VERSION}")
    if size != len(frame) or key_size > MAX_KEY_SIZE or raw_size > max_raw_size:
        raise FrameError("a sealed frame of an impossible size")
    overhead = _FIXED.size + key_size + xaes.TAG_BYTES + _CHECKSUM_BYTES
    if not overhead < size <= overhead + FRAME_PREFIX_SIZE + raw_size:
        raise FrameError("the size of a sealed frame contradicts its content")
    if zero or element >= len(ELEMENTS) or not channels or loss_rank >= len(LOSSES):
        raise FrameError("the header of a sealed frame holds a value outside its range")
    if xxhash.xxh3_64_digest(memoryview(frame)[:-_CHECKSUM_BYTES]) != frame[-_CHECKSUM_BYTES:]:
        raise ChecksumError("a sealed frame does not match its checksum")
    codec_name_of_id(codec_id)
    return SealedHeader(
        key=frame[_FIXED.size : _FIXED.size + key_size],
        raw_size=raw_size,
        frame_size=size,
        codec_id=codec_id,
        layout=ChunkLayout(ELEMENTS[element], channels),
        loss=LOSSES[loss_rank],
        key_id=key_id.rstrip(b"\0").decode("ascii", "replace"),
        nonce=nonce,
    )


class Seals:
    """The sealing keys of one agent. Its methods may be called from any thread.

    Attributes:
        watchers: each called by `reload` when the keys have changed.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Without a path nothing is sealed and nothing opens. Raises SecurityError."""
        self._path = path
        self.watchers: list[Callable[[], None]] = []
        self._keys: Sequence[SealKey] = ()
        self._stamp: Stamp = ()
        if path is not None:
            self._keys, self._stamp = read_seal_keys(path)

    def reload(self) -> bool:
        """Whether the keys had changed. Raises SecurityError: the old ones stay."""
        if self._path is None:
            return False
        keys, present = read_seal_keys(self._path)
        changed = present != self._stamp
        self._keys, self._stamp = keys, present
        if changed:
            for watcher in list(self.watchers):
                watcher()
        return changed

    def key_ids(self, tenant: str) -> tuple[str, ...]:
        """The keys that open what is that tenant's, the one that seals first; empty: not sealed."""
        return tuple(key.key_id for key in self._of(tenant))

    def opens(self, tenant: str, frame: bytes | None) -> bool:
        """Whether the frame (None: a chunk that is raw) can be read here."""
        return self.opens_key(tenant, key_id_of(frame) if frame is not None else "")

    def opens_key(self, tenant: str, key_id: str) -> bool:
        """Whether what that key has sealed for the tenant can be read; empty: it is not sealed."""
        return not key_id or key_id in self.key_ids(tenant)

    def seal(self, frame: bytes, namespace: bytes, tenant: str, loss: str) -> bytes:
        """The frame, sealed for `tenant`; as it is where it is sealed or the tenant has no key."""
        key = next(iter(self._of(tenant)), None)
        if key is None or is_sealed(frame):
            return frame
        header = read_header(frame[:FRAME_PREFIX_SIZE], max_raw_size=1 << 62)
        overhead = _FIXED.size + len(header.key) + xaes.TAG_BYTES + _CHECKSUM_BYTES
        fields = (
            MAGIC,
            VERSION,
            header.codec_id,
            ELEMENTS.index(header.layout.element),
            rank(loss),
            header.layout.channels,
            len(header.key),
            0,
            header.raw_size,
            len(frame) + overhead,
            key.key_id.encode(),
        )
        keys = _tenant_keys(key, tenant)
        unique = _associated(_FIXED.pack(*fields, b"") + header.key, namespace, tenant)
        nonce = blake3(unique, key=keys.nonces).update(frame).digest(length=xaes.NONCE_BYTES)
        head = _FIXED.pack(*fields, nonce) + header.key
        bound = _associated(head, namespace, tenant)
        sealed = head + xaes.encrypt(keys.encryption, nonce, frame, bound)
        return sealed + xxhash.xxh3_64_digest(sealed)

    def open(self, frame: bytes, namespace: bytes, tenant: str) -> bytes:
        """The frame inside a sealed one; one that is not sealed as it is.

        Raises:
            SealError: the key is not here, or it was sealed as something else, or changed.
            FrameError: it is no sealed frame.
        """
        if not is_sealed(frame):
            return frame
        header = read_sealed_header(frame, max_raw_size=1 << 62)
        key = next((each for each in self._of(tenant) if each.key_id == header.key_id), None)
        if key is None:
            raise SealError(f"sealed with key {header.key_id!a}, which is not here")
        bound = _associated(frame[: header.size], namespace, tenant)
        ciphertext = frame[header.size : -_CHECKSUM_BYTES]
        try:
            keys = _tenant_keys(key, tenant)
            opened = xaes.decrypt(keys.encryption, header.nonce, ciphertext, bound)
        except InvalidTag:
            raise SealError(
                f"a frame sealed with key {header.key_id!a} is not what it was sealed as"
            ) from None
        _check_same(header, read_header(opened[:FRAME_PREFIX_SIZE], max_raw_size=header.raw_size))
        return opened

    def reseal(
        self, frame: bytes, namespace: bytes, tenant: str, new_tenant: str, loss: str
    ) -> bytes:
        """One tenant's frame as another's. Raises SealError where it does not open."""
        return self.seal(self.open(frame, namespace, tenant), namespace, new_tenant, loss)

    def _of(self, tenant: str) -> list[SealKey]:
        return [key for key in self._keys if key.tenant is None or key.tenant == tenant]


def _check_same(sealed: SealedHeader, inner: FrameHeader) -> None:
    """The clear header was made of the frame inside; a sealer that errs is found here."""
    if (sealed.key, sealed.raw_size, sealed.codec_id) != (
        inner.key,
        inner.raw_size,
        inner.codec_id,
    ):
        raise SealError("a sealed frame holds another chunk than its header says")


def _associated(head: bytes, namespace: bytes, tenant: str) -> bytes:
    parts = (namespace, tenant.encode())
    return head + b"".join(struct.pack("<I", len(part)) + part for part in parts)


# Deriving takes as long as sealing a small chunk.
@lru_cache(maxsize=4096)
def _tenant_keys(key: SealKey, tenant: str) -> TenantKeys:
    return key.of_tenant(tenant)
