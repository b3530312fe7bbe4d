"""The record of what was done: one JSON line an event, in a file that is rotated.

Lines hold names, sizes and results; never a token, a key or content. Control characters are
escaped, so that one event stays one line whatever a client sends.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import time
from io import TextIOWrapper
from pathlib import Path

from mcp_vllm.security.errors import SecurityError

logger = logging.getLogger(__name__)

FILE_BYTES = 16 << 20
OLD_FILES = 8
MAX_VALUE_CHARS = 300


class Audit:
    """Without a path it records nothing."""

    def __init__(self, path: Path | None) -> None:
        """Raises SecurityError when the file cannot be written."""
        self._file: _PrivateFile | None = None
        if path is None:
            return
        try:
            self._file = _PrivateFile(path)
        except OSError as error:
            raise SecurityError(f"security.audit_file: {error}") from error

    def record(self, event: str, **fields: str | int | None) -> None:
        """Write one line; fields that are None are left out. Raises nothing."""
        if self._file is None:
            return
        known = {name: _bounded(value) for name, value in fields.items() if value is not None}
        line = json.dumps({"time": round(time.time(), 3), "event": event, **known})
        self._file.handle(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _bounded(value: str | int) -> str | int:
    return value[:MAX_VALUE_CHARS] if isinstance(value, str) else value


class _PrivateFile(logging.handlers.RotatingFileHandler):
    """For its owner's eyes only; a full disk is one line in the log, not one for each event."""

    def __init__(self, path: Path) -> None:
        self._failed = False
        super().__init__(path, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="ascii")

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return TextIOWrapper(os.fdopen(descriptor, "ab"), encoding=self.encoding)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failed:
            self._failed = True
            logger.exception("the audit file %s cannot be written", self.baseFilename)
