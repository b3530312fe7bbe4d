"""Whether files have been replaced since they were read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Stamp = tuple[tuple[int, int, int], ...]


def stamp(paths: Sequence[Path]) -> Stamp:
    """Changes when one of the files is written or replaced. Raises OSError when one is missing."""
    stats = [path.stat() for path in paths]
    return tuple((each.st_mtime_ns, each.st_size, each.st_ino) for each in stats)
