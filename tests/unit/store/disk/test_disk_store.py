"""The disk store against a model, and its lines: budget, restart, damage, parents."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
from disk_frames import folder_bytes, frame_of, name_of, stored
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mcp_vllm.codec import ChunkLayout
from mcp_vllm.store.chunk_policy import ChunkPolicy
from mcp_vllm.store.disk import DiskError, DiskStore, StoredFrame, Use
from mcp_vllm.store.disk.segment import Segment
from mcp_vllm.store.policy import Admission
from mcp_vllm.store.ram import ChunkKey

BUDGET = 64 << 10
SEGMENT = 4 << 10


def opened(folder: Path, budget: int = BUDGET, segment: int = SEGMENT) -> DiskStore:
    return DiskStore(folder, budget, segment_bytes=segment)


@contextmanager
def disk_full() -> Iterator[None]:
    """Every write to a segment fails."""
    with mock.patch.object(os, "pwritev", side_effect=OSError(errno.ENOSPC, "full")):
        yield


def content(store: DiskStore) -> dict[ChunkKey, bytes | None]:
    records = [record for name in store if (record := store.find(name)) is not None]
    return store.read(records)


def test_what_was_written_is_there_with_everything_said_of_it(tmp_path: Path) -> None:
    store = opened(tmp_path)
    frame = StoredFrame(
        ChunkKey(b"space", b"key", "tenant ü"), b"x" * 77,
        ChunkLayout("f8", 128, position=9), 1234, "balanced", "key-1",
    )  # fmt: skip
    assert store.write([frame]) == 1
    for _ in range(2):
        record = store.find(frame.name)
        assert record is not None
        assert record.stored(b"x" * 77) == frame
        assert store.read([record]) == {frame.name: frame.frame}
        store.close()
        store = opened(tmp_path)
    store.close()


class RefusesLarge(ChunkPolicy):
    def admit(self, name: ChunkKey, size_bytes: int) -> Admission[ChunkKey]:
        if size_bytes > 1000:
            return Admission([], [])
        return super().admit(name, size_bytes)


@pytest.mark.parametrize("together", [False, True])
def test_a_lossy_chunk_stays_when_the_exact_one_is_refused(tmp_path: Path, together: bool) -> None:
    store = DiskStore(tmp_path, BUDGET, segment_bytes=SEGMENT, policy=RefusesLarge)
    lossy, exact = stored(1, 300, "small"), stored(1, 2000)
    if together:
        store.write([lossy, exact])
    else:
        store.write([lossy])
        store.write([exact])
    assert content(store) == {lossy.name: lossy.frame}
    assert store.refused == {"policy": 1}
    store.check_integrity()
    smaller = stored(1, 500)
    store.write([smaller])
    assert content(store) == {smaller.name: smaller.frame}
    store.check_integrity()
    store.close()


@pytest.mark.parametrize("exact_bytes", [2000, 200])
def test_a_lossy_chunk_stays_when_the_exact_one_does_not_fit_the_disk(
    tmp_path: Path, exact_bytes: int
) -> None:
    clock = iter(range(0, 10_000, 5))
    store = DiskStore(tmp_path, BUDGET, segment_bytes=SEGMENT, clock=lambda: next(clock))
    lossy, exact = stored(1, 300, "small"), stored(1, exact_bytes)
    store.write([lossy])
    with disk_full():
        assert store.write([exact]) == 0
    assert store.refused == {"full": 1}
    assert content(store) == {lossy.name: lossy.frame}
    store.check_integrity()
    assert store.write([exact]) == 1
    assert content(store) == {exact.name: exact.frame}
    store.check_integrity()
    store.close()


def test_neighbours_are_read_at_once_and_come_out_apart(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write([stored(number, 100 + number) for number in range(20)])
    assert content(store) == {name_of(n): frame_of(n, 100 + n) for n in range(20)}


def test_the_oldest_leave_and_parents_after_their_children(tmp_path: Path) -> None:
    hours = iter(range(10_000))
    clock = lambda: 3600.0 * next(hours)  # noqa: E731
    store = DiskStore(
        tmp_path, BUDGET, segment_bytes=SEGMENT, policy=lambda size: ChunkPolicy(size, clock=clock)
    )
    chain = [name_of(number) for number in range(6)]
    store.write([stored(number) for number in range(6)])
    store.touch(Use(chain))
    left: list[ChunkKey] = []
    store.watchers.append(lambda name, present: None if present else left.append(name))
    store.write([stored(number) for number in range(100, 400)])
    assert [name for name in left if name in chain] == chain[::-1]
    assert name_of(399) in set(store)
    store.check_integrity()


def test_a_better_chunk_replaces_one_that_lost_more(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write([stored(1, 500, "small")])
    assert store.write([stored(1, 600, "small")]) == 0
    assert store.write([stored(1, 700)]) == 1
    assert store.write([stored(1, 500, "small")]) == 0
    store.close()
    store = opened(tmp_path)
    assert content(store) == {name_of(1): frame_of(1, 700)}


def test_what_was_discarded_does_not_come_back(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write([stored(number) for number in range(10)])
    store.discard(name_of(3))
    store.close()
    store = opened(tmp_path)
    assert name_of(3) not in set(store)
    assert len(store) == 9


def test_a_frame_that_is_too_large_is_refused_and_counted(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store.write([stored(1, SEGMENT)]) == 0
    assert store.refused == {"large": 1}


def test_only_one_process_uses_a_folder(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(DiskError, match="another process"):
        opened(tmp_path)
    first.close()
    opened(tmp_path).close()


def test_a_smaller_budget_is_kept_from_the_start(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write([stored(number) for number in range(60)])
    store.close()
    store = opened(tmp_path, BUDGET // 2, SEGMENT // 2)
    assert folder_bytes(tmp_path) <= BUDGET // 2
    store.check_integrity()
    assert name_of(59) in set(store)
    for name, frame in content(store).items():
        assert frame == frame_of(int.from_bytes(name.key, "big"), 1000)
    store.write([stored(number) for number in range(100, 140)])
    assert folder_bytes(tmp_path) <= BUDGET // 2
    store.check_integrity()


def test_compaction_gives_back_what_is_dead(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write([stored(number) for number in range(40)])
    for number in range(0, 40, 2):
        store.discard(name_of(number))
    store.compact()
    size = store.size()
    assert size.file_bytes == folder_bytes(tmp_path)
    assert size.file_bytes - size.live_bytes == 16 * size.num_segments
    assert content(store) == {name_of(n): frame_of(n, 1000) for n in range(1, 40, 2)}


def test_the_budget_holds_in_every_write_of_a_rewrite_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, most = os.pwritev, [0]

    def measured(fd: int, buffers: Sequence[bytes], offset: int) -> int:
        written = real(fd, buffers, offset)
        most[0] = max(most[0], folder_bytes(tmp_path))
        return written

    monkeypatch.setattr(os, "pwritev", measured)
    store = opened(tmp_path)
    for number in range(400):
        store.write([stored(number, 900)])
        store.touch(Use([name_of(kept) for kept in range(0, 60, 5)]))
    assert store.compactions > 10
    assert BUDGET - 3 * SEGMENT < most[0] <= BUDGET
    store.check_integrity()


def test_a_copy_that_a_rewrite_left_behind_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    store.write([stored(number) for number in range(6)])
    store.discard(name_of(0))
    with monkeypatch.context() as killed:  # after the copy was written, before the old one is gone
        killed.setattr(Segment, "mark_dead", lambda self, record: None)
        killed.setattr(Segment, "unlink", lambda self: None)
        store.compact()
        store.close()
    assert folder_bytes(tmp_path) > 9_000, "no copies are left"
    store = opened(tmp_path)
    assert len(store) == 5
    store.check_integrity()
    store.discard(name_of(1))
    store.close()
    store = opened(tmp_path)
    assert name_of(1) not in set(store)
    store.check_integrity()


class StoreAgainstModel(RuleBasedStateMachine):
    """Any sequence of operations: what is held is what a dictionary holds, minus what left."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="mcp-disk-"))
        self.model: dict[ChunkKey, bytes] = {}
        self.open()

    def open(self) -> None:
        ticks = itertools.count(0, 5)  # a full disk is tried again at once
        self.store = DiskStore(
            self.folder, BUDGET, segment_bytes=SEGMENT, clock=lambda: float(next(ticks))
        )
        self.store.watchers.append(self.changed)

    def changed(self, name: ChunkKey, present: bool) -> None:
        if not present:
            self.model.pop(name, None)

    @rule(
        numbers=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3000)), max_size=8),
        loss=st.sampled_from(["", "small"]),
        is_full=st.sampled_from([False, False, True]),
    )
    def put(self, numbers: list[tuple[int, int]], loss: str, is_full: bool) -> None:
        batch = [stored(number, size, loss) for number, size in numbers]
        before = {name: self.store.find(name) for name in self.store}
        with disk_full() if is_full else nullcontext():
            self.store.write(batch)
        for each in batch:
            record = self.store.find(each.name)
            is_new = record is not None and before.get(each.name) is not record
            if is_new and (record.loss, record.frame_bytes) == (each.loss, len(each.frame)):
                self.model[each.name] = each.frame

    @rule(number=st.integers(0, 40))
    def discard(self, number: int) -> None:
        self.store.discard(name_of(number))
        self.model.pop(name_of(number), None)

    @rule(numbers=st.lists(st.integers(0, 40), max_size=8, unique=True))
    def touch(self, numbers: list[int]) -> None:
        self.store.touch(Use([name_of(number) for number in numbers]))

    @rule()
    def compact(self) -> None:
        self.store.compact()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()

    @invariant()
    def is_as_the_model(self) -> None:
        assert content(self.store) == self.model
        assert folder_bytes(self.folder) <= BUDGET
        self.store.check_integrity()

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)


StoreAgainstModel.TestCase.settings = hypothesis_settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestStoreAgainstModel = StoreAgainstModel.TestCase
