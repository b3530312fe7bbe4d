"""Files that are not as they were written: bits, lengths, strangers, versions, a full disk."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_frames import folder_bytes, frame_of, name_of, stored
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mcp_vllm.store.disk import DiskError, DiskStore
from mcp_vllm.store.disk.entry import HEAD, MAGIC, VERSION

BUDGET = 256 << 10
SEGMENT = 8 << 10
NUMBERS = range(30)


def opened(folder: Path) -> DiskStore:
    return DiskStore(folder, BUDGET, segment_bytes=SEGMENT)


def filled(folder: Path) -> None:
    store = opened(folder)
    assert store.write([stored(number) for number in NUMBERS]) == len(NUMBERS)
    store.close()


def right_frames(store: DiskStore) -> int:
    """How many frames are served, after checking that none of them is wrong."""
    right = 0
    for name in store:
        record = store.find(name)
        assert record is not None
        frame = store.read([record])[name]
        if frame is None:
            store.discard_damaged(record)
        else:
            assert frame == frame_of(int.from_bytes(name.key, "big"), 1000)
            right += 1
    return right


@given(which=st.integers(0, 100), at=st.integers(0, 1 << 20), bit=st.integers(0, 7))
@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_flipped_bit_costs_what_it_hit_and_serves_nothing_wrong(
    tmp_path_factory: pytest.TempPathFactory, which: int, at: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    filled(folder)
    files = sorted(path for path in folder.iterdir() if path.stat().st_size)
    path = files[which % len(files)]
    body = bytearray(path.read_bytes())
    body[at % len(body)] ^= 1 << bit
    path.write_bytes(body)
    store = opened(folder)
    # A bit of a head costs a segment, any other one frame.
    lost = SEGMENT // 1000 if path.suffix == ".index" and at % len(body) < HEAD.size else 1
    assert right_frames(store) >= len(NUMBERS) - lost
    store.check_integrity()
    store.close()


@given(which=st.integers(0, 100), share=st.floats(0, 1))
@hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_file_cut_short_costs_the_frames_behind_the_cut(
    tmp_path_factory: pytest.TempPathFactory, which: int, share: float
) -> None:
    folder = tmp_path_factory.mktemp("store")
    filled(folder)
    files = sorted(path for path in folder.iterdir() if path.stat().st_size)
    path = files[which % len(files)]
    os.truncate(path, int(share * path.stat().st_size))
    store = opened(folder)
    assert right_frames(store) >= len(NUMBERS) - SEGMENT // 1000
    store.write([stored(number) for number in NUMBERS])
    assert right_frames(store) == len(NUMBERS)
    store.check_integrity()
    store.close()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    filled(tmp_path)
    strangers = [tmp_path / "notes.txt", tmp_path / "1.frames", tmp_path / "00000001.frames.bak"]
    for path in strangers:
        path.write_text("mine")
    (tmp_path / "folder").mkdir()
    store = opened(tmp_path)
    assert right_frames(store) == len(NUMBERS)
    store.close()
    assert all(path.read_text() == "mine" for path in strangers)


def test_half_a_segment_is_removed(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "00000001.index").unlink()
    (tmp_path / "00000099.index").write_bytes(HEAD.pack(MAGIC, VERSION, 99))
    (tmp_path / "00000100.frames").write_bytes(b"x" * 5000)
    (tmp_path / "00000101.index").write_bytes(b"")
    (tmp_path / "00000101.frames").write_bytes(b"")
    store = opened(tmp_path)
    store.check_integrity()
    left = {path.name for path in tmp_path.iterdir()}
    assert not left & {"00000001.frames", "00000099.index", "00000100.frames", "00000101.index"}
    store.close()


def test_a_segment_of_a_later_version_stays_and_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path)
    index, frames = tmp_path / "00000050.index", tmp_path / "00000050.frames"
    index.write_bytes(HEAD.pack(MAGIC, VERSION + 1, 50) + b"of the future")
    frames.write_bytes(b"y" * 3000)
    store = opened(tmp_path)
    assert f"version {VERSION + 1}" in caplog.text
    assert right_frames(store) == len(NUMBERS)
    assert store.size().file_bytes == folder_bytes(tmp_path)
    store.write([stored(number) for number in range(100, 400)])
    assert folder_bytes(tmp_path) <= BUDGET
    store.close()
    assert index.read_bytes().endswith(b"of the future")


def test_a_folder_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be used for chunks"):
        opened(tmp_path / "file")


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_full_disk_stops_storing_keeps_serving_and_takes_chunks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    store = DiskStore(tmp_path, BUDGET, segment_bytes=SEGMENT, clock=clock)
    store.write([stored(number) for number in NUMBERS])
    real = os.pwritev
    calls = []

    def full(fd: int, buffers: list[bytes], offset: int) -> int:
        calls.append(offset)
        if len(calls) % 2:  # some of it still fits
            return real(fd, [bytes(buffers[0])[:10]], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", full)
        assert store.write([stored(100), stored(101)]) == 0
        assert store.size().is_full
        tried = len(calls)
        assert store.write([stored(102)]) == 0
        assert len(calls) == tried, "it is not tried again at once"
        clock.now_s += 5
        assert store.write([stored(103)]) == 0
        assert len(calls) > tried
    assert right_frames(store) == len(NUMBERS)
    store.check_integrity()
    assert caplog.text.count("takes no more chunks") == 1
    clock.now_s += 5
    assert store.write([stored(104)]) == 1
    assert not store.size().is_full
    assert "takes chunks again" in caplog.text
    assert store.refused == {"full": 4}
    store.check_integrity()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_file_system_that_fills_up_loses_nothing(small_disk: Path) -> None:
    clock = Clock()
    budget = 16 << 20
    store = DiskStore(small_disk, budget, segment_bytes=256 << 10, clock=clock)
    written = sum(store.write([stored(number, 50_000)]) for number in range(40))
    assert 10 <= written < 22
    assert store.size().is_full

    def right() -> int:
        records = list(filter(None, map(store.find, store)))
        frames = store.read(records)
        assert all(
            frame == frame_of(int.from_bytes(name.key, "big"), 50_000)
            for name, frame in frames.items()
        )
        return len(frames)

    assert right() == written
    store.close()
    store = DiskStore(small_disk, budget, segment_bytes=256 << 10, clock=clock)
    assert right() == written
    for number in range(5):  # on a full disk, too, what is discarded goes
        store.discard(name_of(number))
    store.close()
    store = DiskStore(small_disk, budget, segment_bytes=256 << 10, clock=clock)
    assert right() == written - 5
    clock.now_s += 5
    assert store.write([stored(100, 50_000)]) == 1
    assert not store.size().is_full
    store.check_integrity()
    store.close()
