"""A download that goes on where its connection broke."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx


class UnfinishedFile:
    """The file of an export until it is complete, and the tag of the archive that it belongs to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.part")
        self._tag = path.with_name(f"{path.name}.tag")

    def headers(self) -> dict[str, str]:
        """What to ask for: the rest of what is here, or everything."""
        try:
            size, tag = self._part.stat().st_size, self._tag.read_text()
        except OSError:
            return {}
        return {"Range": f"bytes={size}-", "If-Match": tag} if size else {}

    def open(self, response: httpx.Response) -> Any:
        """The file, where the bytes of the answer belong."""
        mode = "ab" if response.status_code == httpx.codes.PARTIAL_CONTENT else "wb"
        self._tag.write_text(response.headers.get("ETag", ""))
        return self._part.open(mode)

    def complete(self) -> None:
        """All of it is here."""
        os.replace(self._part, self._path)
        self._tag.unlink(missing_ok=True)
