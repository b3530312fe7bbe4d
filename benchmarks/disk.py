"""The disk tier's segments against embedded libraries: writing, reading, starting again.

    python benchmarks/disk.py --folder DISK [--frames 400] [--rounds 3]

Frames are random bytes (what a codec makes is as good as random) of 200 kB to 2 MB, the same for
all. Every store gets the same budget, writes in batches of 8 MiB, and is asked for checksums on
reading: the libraries have none over values, so `xxh3_128` is computed for them as for us. Files
are synced after writing, which is timed apart: it is the disk's time more than ours. Reading is
done twice: after the kernel was told to forget the files (`posix_fadvise`), starting included, and
from the page cache. Starting is opening the folder until it is known which chunks are there,
imports not counted. Needs the libraries of the extra `bench`; one that is missing is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import xxhash
from setting import one_line

from mcp_vllm.codec import ChunkLayout
from mcp_vllm.store.disk import DiskStore, StoredFrame
from mcp_vllm.store.ram import ChunkKey

BATCH_BYTES = 8 << 20
BUDGET_BYTES = 4 << 30
LAYOUT = ChunkLayout("bf16", 64)
Item = tuple[bytes, bytes]


class Contender(Protocol):
    """A store of frames by key, opened in a folder."""

    def write(self, batch: Sequence[Item]) -> None: ...

    def sync(self) -> None: ...

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]: ...

    def keys(self) -> int:
        """How many chunks are there, all of them named."""
        ...

    def close(self) -> None: ...


class Segments:
    def __init__(self, folder: Path) -> None:
        self._store = DiskStore(folder, BUDGET_BYTES)

    def write(self, batch: Sequence[Item]) -> None:
        frames = [StoredFrame(_name(key), value, LAYOUT, 2 * len(value)) for key, value in batch]
        assert self._store.write(frames) == len(batch)

    def sync(self) -> None:
        for segment in self._store._segments.values():
            segment.sync()

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        records = [record for key in keys if (record := self._store.find(_name(key)))]
        frames = self._store.read(records)
        return [frames[_name(key)] for key in keys]

    def keys(self) -> int:
        return len(list(self._store))

    def close(self) -> None:
        self._store.close()


class _Checked:
    """What a library lacks: a checksum with each value."""

    def checked(self, value: bytes | None) -> bytes | None:
        if value is None or xxhash.xxh3_128_digest(memoryview(value)[16:]) != value[:16]:
            return None
        return value[16:]

    def with_checksum(self, value: bytes) -> bytes:
        return xxhash.xxh3_128_digest(value) + value


class Sqlite(_Checked):
    def __init__(self, folder: Path) -> None:
        self._db = sqlite3.connect(folder / "frames.db", isolation_level=None)
        self._db.execute("pragma page_size=65536")
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=off")
        self._db.execute("create table if not exists frames (key blob primary key, value blob)")

    def write(self, batch: Sequence[Item]) -> None:
        self._db.execute("begin")
        rows = [(key, self.with_checksum(value)) for key, value in batch]
        self._db.executemany("insert into frames values (?, ?)", rows)
        self._db.execute("commit")

    def sync(self) -> None:
        self._db.execute("pragma wal_checkpoint(truncate)")

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        ask = "select value from frames where key = ?"
        return [self.checked(self._db.execute(ask, (key,)).fetchone()[0]) for key in keys]

    def keys(self) -> int:
        return len(self._db.execute("select key from frames").fetchall())

    def close(self) -> None:
        self._db.close()


class Lmdb(_Checked):
    def __init__(self, folder: Path) -> None:
        lmdb = importlib.import_module("lmdb")
        self._env = lmdb.open(str(folder), map_size=BUDGET_BYTES, sync=False, readahead=True)

    def write(self, batch: Sequence[Item]) -> None:
        with self._env.begin(write=True) as transaction:
            for key, value in batch:
                transaction.put(key, self.with_checksum(value))

    def sync(self) -> None:
        self._env.sync(True)

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        with self._env.begin() as transaction:
            return [self.checked(transaction.get(key)) for key in keys]

    def keys(self) -> int:
        with self._env.begin() as transaction:
            return len(list(transaction.cursor().iternext(values=False)))

    def close(self) -> None:
        self._env.close()


class Rocks(_Checked):
    """With blob files, which is what RocksDB has for large values."""

    def __init__(self, folder: Path) -> None:
        rocksdict = importlib.import_module("rocksdict")
        options = rocksdict.Options(raw_mode=True)
        options.set_enable_blob_files(True)
        options.set_min_blob_size(4096)
        options.set_compression_type(rocksdict.DBCompressionType.none())
        self._rocksdict = rocksdict
        self._db = rocksdict.Rdict(str(folder / "db"), options)

    def write(self, batch: Sequence[Item]) -> None:
        writes = self._rocksdict.WriteBatch(raw_mode=True)
        for key, value in batch:
            writes.put(key, self.with_checksum(value))
        self._db.write(writes)

    def sync(self) -> None:
        self._db.flush()

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.checked(value) for value in self._db.get(list(keys))]

    def keys(self) -> int:
        return len(list(self._db.keys()))

    def close(self) -> None:
        self._db.close()


class DiskCache(_Checked):
    def __init__(self, folder: Path) -> None:
        diskcache = importlib.import_module("diskcache")
        self._cache = diskcache.Cache(
            str(folder), size_limit=BUDGET_BYTES, eviction_policy="none", disk=diskcache.Disk
        )

    def write(self, batch: Sequence[Item]) -> None:
        with self._cache.transact():
            for key, value in batch:
                self._cache.set(key, self.with_checksum(value))

    def sync(self) -> None:
        os.sync()

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [self.checked(self._cache.get(key)) for key in keys]

    def keys(self) -> int:
        return len(list(self._cache))

    def close(self) -> None:
        self._cache.close()


CONTENDERS: dict[str, Callable[[Path], Any]] = {
    "segments": Segments,
    "sqlite3": Sqlite,
    "lmdb": Lmdb,
    "rocksdict": Rocks,
    "diskcache": DiskCache,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    frames = list(_frames(asked.frames))
    size = sum(len(value) for _, value in frames)
    print(one_line())
    print(
        f"{len(frames)} frames, {size / 1e6:.0f} MB, the best of {asked.rounds} rounds each, "
        "MB = 10^6 B"
    )
    results = {name: [] for name in CONTENDERS}
    for turn in range(asked.rounds):  # each time another one is first
        for name in _rotated(list(CONTENDERS), turn):
            with contextlib.suppress(ImportError):
                results[name].append(_measured(CONTENDERS[name], frames, size, asked.folder))
    best = {
        name: {
            key: (max if key.endswith("mb_s") else min)(each[key] for each in rounds)
            for key in rounds[0]
        }
        for name, rounds in results.items()
        if rounds
    }
    _show(best)
    if asked.json:
        asked.json.write_text(json.dumps(best, indent=2))


def _rotated(names: list[str], turn: int) -> list[str]:
    start = turn % len(names)
    return names[start:] + names[:start]


def _frames(count: int) -> Iterator[Item]:
    choose = random.Random(1)
    for number in range(count):
        size = int(200_000 * 10 ** choose.random())
        yield number.to_bytes(36, "big"), choose.randbytes(size)


def _measured(
    make: Callable[[Path], Contender], frames: Sequence[Item], size: int, parent: Path
) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(prefix="disk-bench-", dir=parent))
    os.sync()  # what the one before left to be written is not this one's burden
    try:
        store = make(folder)
        with _timed() as writing:
            for batch in _batches(frames):
                store.write(batch)
        with _timed() as syncing:
            store.sync()
        store.close()
        file_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        _forget(folder)
        with _timed() as starting:
            store = make(folder)
            assert store.keys() == len(frames)
        with _timed() as cold:
            _read_all(store, frames)
        with _timed() as warm:
            _read_all(store, frames)
        store.close()
    finally:
        shutil.rmtree(folder)
    return {
        "write_mb_s": size / 1e6 / writing[0],
        "sync_ms": 1000 * syncing[0],
        "cold_mb_s": size / 1e6 / (starting[0] + cold[0]),
        "warm_mb_s": size / 1e6 / warm[0],
        "restart_ms": 1000 * starting[0],
        "overhead_percent": 100 * (file_bytes / size - 1),
    }


def _read_all(store: Contender, frames: Sequence[Item]) -> None:
    for batch in _batches(frames):
        got = store.read([key for key, _ in batch])
        assert all(value == frame for value, (_, frame) in zip(got, batch, strict=True))


def _batches(frames: Sequence[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in frames:
        batch.append(item)
        if sum(len(value) for _, value in batch) >= BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _forget(folder: Path) -> None:
    """Let the kernel drop what it caches of the files."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


@contextlib.contextmanager
def _timed() -> Iterator[list[float]]:
    taken: list[float] = []
    started = time.perf_counter()
    yield taken
    taken.append(time.perf_counter() - started)


def _name(key: bytes) -> ChunkKey:
    return ChunkKey(b"namespace", key)


def _show(best: dict[str, dict[str, float]]) -> None:
    print(
        f"{'':10} {'write':>9} {'sync':>8} {'cold read':>10} {'warm read':>10} "
        f"{'start':>9} {'files':>7}"
    )
    for name, each in best.items():
        print(
            f"{name:10} {each['write_mb_s']:4.0f} MB/s {each['sync_ms']:5.0f} ms "
            f"{each['cold_mb_s']:5.0f} MB/s "
            f"{each['warm_mb_s']:5.0f} MB/s {each['restart_ms']:6.1f} ms "
            f"{each['overhead_percent']:+5.1f} %"
        )
    ours = best["segments"]
    for name, each in best.items():
        if name != "segments":
            print(
                f"segments / {name}: write {ours['write_mb_s'] / each['write_mb_s']:.2f} x, cold "
                f"{ours['cold_mb_s'] / each['cold_mb_s']:.2f} x, warm "
                f"{ours['warm_mb_s'] / each['warm_mb_s']:.2f} x"
            )


if __name__ == "__main__":
    main()
