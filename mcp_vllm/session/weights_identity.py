"""The identity of a model's weights: one digest of their content, the same on every host.

It is part of the fingerprint that decides whether two engines may exchange KV blocks, so it covers
every byte of the weight files and nothing about where they lie. The connector and `doctor` call it
at start; digests of unchanged files come from a small JSON file, so a second start reads nothing.
A file counts as unchanged while its path, size, modification and change times and inode are.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from blake3 import blake3

from mcp_vllm.errors import McpError

_PATTERNS = (("*.safetensors",), ("*.gguf",), ("*.bin", "*.pt"))
_CACHE_NAME = "weights_identity.json"
_CACHE_VERSION = 1
_SETTLED_NS = 1_000_000_000  # a file changed more recently could change again within a clock tick


class WeightsNotFound(McpError):
    """The folder or file holds no weights."""


class WeightsUnreadable(McpError):
    """A weight file cannot be read, or changes while it is read."""


@dataclass(frozen=True)
class _FileState:
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "_FileState":
        stat = path.stat()
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)

    def is_settled(self) -> bool:
        return time.time_ns() - max(self.mtime_ns, self.ctime_ns) > _SETTLED_NS


@dataclass(frozen=True)
class _Record:
    state: _FileState
    digest: str


def weights_identity(model_dir: Path, cache_dir: Path | None) -> str:
    """Hex digest over name, size and content of the weight files of a folder, or of a single file.

    Of a folder, the *.safetensors files count; without any, *.gguf; without any, *.bin and *.pt.
    `cache_dir` keeps the files' digests between calls; None hashes everything anew.
    """
    cache = _DigestCache(cache_dir)
    whole = blake3()
    for name, path in _weight_files(model_dir):
        try:
            size_bytes, digest = cache.digest_of(path)
        except OSError as error:
            raise WeightsUnreadable(
                f"cannot read the weight file {path}: {error.strerror}; check its permissions"
            ) from error
        whole.update(f"{len(name)}:{name}:{size_bytes}:{digest}\n".encode())
    cache.save()
    return whole.hexdigest()


def _weight_files(model_dir: Path) -> Iterator[tuple[str, Path]]:
    """Names relative to the folder (empty for a single file) and paths, in order of name."""
    if model_dir.is_file():
        yield "", model_dir
        return
    for patterns in _PATTERNS:
        paths = [path for pattern in patterns for path in model_dir.glob(pattern)]
        if files := sorted(path for path in paths if path.is_file()):
            yield from ((path.name, path) for path in files)
            return
    raise WeightsNotFound(
        f"no *.safetensors, *.gguf, *.bin or *.pt in {model_dir}; "
        "name the folder that holds the model's weights"
    )


class _DigestCache:
    """Digests by absolute path; a cache file that cannot be used counts as empty."""

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / _CACHE_NAME if folder else None
        self._records = _read_records(self._path) if self._path else {}
        self._changed = False

    def digest_of(self, path: Path) -> tuple[int, str]:
        """Size and digest of the file's content; reads the file only when it may have changed."""
        key, state = os.path.abspath(path), _FileState.of(path)
        record = self._records.get(key)
        if record and record.state == state:
            return state.size_bytes, record.digest
        digest = _hash_file(path)
        if _FileState.of(path) != state:
            raise WeightsUnreadable(
                f"the weight file {path} changed while it was read; start again once it is whole"
            )
        if state.is_settled():
            self._records[key] = _Record(state, digest)
            self._changed = True
        return state.size_bytes, digest

    def save(self) -> None:
        """Replace the cache file; without effect when nothing is new or the folder is read-only."""
        if not self._changed or self._path is None:
            return
        kept = {key: asdict(value) for key, value in self._records.items() if os.path.exists(key)}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _replace_file(self._path, json.dumps({"version": _CACHE_VERSION, "files": kept}))
        except OSError:
            return


def _read_records(path: Path) -> dict[str, _Record]:
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != _CACHE_VERSION:
            return {}
        return {
            key: _Record(_FileState(**entry["state"]), _checked_digest(entry["digest"]))
            for key, entry in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _checked_digest(text: str) -> str:
    if len(bytes.fromhex(text)) != blake3.digest_size:
        raise ValueError(f"not a digest: {text}")
    return text


def _replace_file(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _hash_file(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
