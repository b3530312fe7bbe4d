"""Shared memory between an engine and its agent: file descriptors that travel over the Unix socket.

Passing descriptors instead of names needs no shared file system and leaves nothing behind when
either side is killed.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mcp_vllm.link.protocol import LENGTH, LinkError, body_size

Bytes2D = NDArray[np.uint8]

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred


@dataclass
class MappedRows:
    """A mapped region seen as rows of equal size.

    Attributes:
        rows: uint8, shape (num_rows, row_bytes), backed by the mapping.
    """

    rows: Bytes2D
    _mapping: mmap.mmap

    def close(self) -> None:
        """Unmap. Rows handed out before must not be used any more."""
        self.rows = np.empty((0, 0), dtype=np.uint8)
        try:
            self._mapping.close()
        except BufferError:
            # A copy in another thread still holds a view: the mapping ends with it.
            return


def map_rows(fd: int, num_rows: int, row_bytes: int, *, writable: bool) -> MappedRows:
    """Map `num_rows * row_bytes` bytes of `fd`, shared.

    Raises:
        LinkError: the file behind `fd` is smaller than that, or the sizes are not positive.
    """
    size = num_rows * row_bytes
    if num_rows <= 0 or row_bytes <= 0 or os.fstat(fd).st_size < size:
        raise LinkError(f"shared memory does not hold {num_rows} rows of {row_bytes} bytes")
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=prot)
    rows = np.frombuffer(mapping, dtype=np.uint8).reshape(num_rows, row_bytes)
    return MappedRows(rows, mapping)


def create_memory(name: str, size_bytes: int) -> int:
    """An anonymous shared memory file of that size; the caller closes the descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, size_bytes)
    return fd


def reopen_read_only(fd: int) -> int:
    """A read-only descriptor of the same file; the caller closes it."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def check_same_user(sock: socket.socket) -> None:
    """Refuse to share memory with another user's process at the other end of a Unix socket.

    Raises:
        LinkError: it runs as neither our user nor root.
    """
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    if uid not in (os.getuid(), 0):
        raise LinkError(f"the other end of the socket runs as user {uid}")


def send_with_fd(sock: socket.socket, packed: bytes, fd: int | None) -> None:
    """Send one packed message; `fd`, when given, travels with its first byte. Blocking."""
    if fd is None:
        sock.sendall(packed)
        return
    sent = socket.send_fds(sock, [packed], [fd])
    if sent < len(packed):  # or a peer that has read all and left would seem to have failed us
        sock.sendall(packed[sent:])


def receive_with_fd(sock: socket.socket, deadline_s: float) -> tuple[bytes, int | None]:
    """One message's body and the descriptor that came with it, whole within `deadline_s`. Blocking.

    Raises:
        LinkError: the connection ended, the message is too large, or it took too long.
    """
    until_s = time.monotonic() + deadline_s
    sock.settimeout(deadline_s)
    try:
        head, fds, _, _ = socket.recv_fds(sock, LENGTH.size, 4, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError as error:
        raise LinkError(f"no message within {deadline_s:g} s") from error
    fd = fds[0] if fds else None
    for extra in fds[1:]:
        os.close(extra)
    try:
        head += _receive_exactly(sock, LENGTH.size - len(head), until_s)
        return _receive_exactly(sock, body_size(head), until_s), fd
    except BaseException:
        if fd is not None:
            os.close(fd)
        raise


def _receive_exactly(sock: socket.socket, size: int, until_s: float) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise LinkError("a message did not arrive whole in time")
        sock.settimeout(left_s)
        try:
            part = sock.recv(size - len(parts))
        except TimeoutError:
            continue
        if not part:
            raise LinkError("the connection ended in the middle of a message")
        parts += part
    return bytes(parts)
