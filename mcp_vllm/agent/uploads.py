"""Imports of archives that broke off: where each stopped, so that it can go on there for a while.

The client names its upload; what has come is verified and kept as it comes, and only whole frames
count, so a pause holds no bytes. Owned by the agent's event loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from mcp_vllm.errors import McpError
from mcp_vllm.session.archive import ArchiveReader

MAX_PAUSED = 256
KEPT_S = 900.0


class UploadError(McpError):
    """It cannot go on there."""


@dataclass
class Upload:
    """One archive on its way.

    Attributes:
        arrived: keys of the chunks that were kept.
        received: bytes of the archive that need not come again.
        is_waiting: for bytes: all that came was dealt with.
    """

    reader: ArchiveReader = field(default_factory=ArchiveReader)
    arrived: set[bytes] = field(default_factory=set)
    received: int = 0
    is_waiting: bool = True
    paused_s: float = 0.0

    def pause(self) -> None:
        self.received -= self.reader.forget_unfinished()
        self.paused_s = time.monotonic()


class Uploads:
    """Those that are paused, by who makes them and the name that they gave."""

    def __init__(self) -> None:
        self._paused: dict[tuple[str, str], Upload] = {}

    def received(self, who: tuple[str, str]) -> int:
        """Where that upload goes on; 0: it is not known, and begins."""
        upload = self._known(who)
        return upload.received if upload is not None else 0

    def take(self, who: tuple[str, str], offset: int) -> Upload:
        """The upload, to go on at that byte; a new one at 0. Raises UploadError."""
        upload = self._known(who)
        if offset == 0:
            self._paused.pop(who, None)
            return Upload()
        if upload is None or upload.received != offset:
            at = 0 if upload is None else upload.received
            raise UploadError(f"the upload goes on at byte {at}, not {offset}")
        return self._paused.pop(who)

    def pause(self, who: tuple[str, str], upload: Upload) -> None:
        """It broke off while it waited for bytes."""
        upload.pause()
        self._paused[who] = upload
        while len(self._paused) > MAX_PAUSED:
            del self._paused[next(iter(self._paused))]

    def _known(self, who: tuple[str, str]) -> Upload | None:
        upload = self._paused.get(who)
        if upload is not None and time.monotonic() - upload.paused_s > KEPT_S:
            del self._paused[who]
            return None
        return upload
