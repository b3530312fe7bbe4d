"""The agent's policy for chunks: what it learned survives a restart, quotas hold, names cannot
collide by design."""

from __future__ import annotations

from pathlib import Path

import pytest
from disk_frames import stored

from mcp_vllm.store.chunk_policy import ChunkPolicy, PolicyFile
from mcp_vllm.store.disk import DiskStore
from mcp_vllm.store.ram import ChunkKey
from mcp_vllm.store.smart_cache.policy import MAX_TENANTS

BUDGET = 100_000
SIZE = 1000


def name_of(number: int, tenant: str = "default") -> ChunkKey:
    return ChunkKey(b"n" * 16, number.to_bytes(36, "big"), tenant)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def policy_of(folder: Path, clock: Clock | None = None, max_bytes: int = 4 << 20) -> ChunkPolicy:
    file = PolicyFile(folder / "memory.policy", max_bytes)
    return ChunkPolicy(BUDGET, file=file, clock=clock or Clock())


def test_what_was_learned_is_there_for_the_next_with_its_names(tmp_path: Path) -> None:
    clock = Clock()
    first = policy_of(tmp_path, clock)
    for _ in range(3):
        clock.now_s += 60
        first.access([name_of(1), name_of(2)])
    clock.now_s += 30
    first.keep()
    second = policy_of(tmp_path)
    seen = second.explain(name_of(1))
    assert seen is not None
    assert (seen.uses, seen.turn, seen.held) == (3, 3, False)
    assert seen.age_s == pytest.approx(30, abs=0.1)
    assert second.explain(name_of(3)) is None
    assert second.admit(name_of(1), SIZE).kept == [name_of(1)]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "large"])
def test_a_damaged_file_is_left_out_and_said(tmp_path: Path, damage: str, caplog) -> None:
    first = policy_of(tmp_path)
    first.access([name_of(1)])
    first.keep()
    path = tmp_path / "memory.policy"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": content[:-40], "flip": content, "empty": b"", "large": content * 9}
    path.write_bytes(bytes(damaged[damage]))
    second = policy_of(tmp_path)
    assert second.explain(name_of(1)) is None
    assert "memory.policy is not used" in caplog.text


def test_what_is_too_large_for_its_share_is_not_written(tmp_path: Path, caplog) -> None:
    policy_of(tmp_path, max_bytes=1000).keep()
    assert not list(tmp_path.iterdir())
    assert "is not written" in caplog.text


def test_of_a_long_history_the_latest_is_written(tmp_path: Path) -> None:
    clock, empty = Clock(), tmp_path / "empty"
    empty.mkdir()
    policy_of(empty).keep()
    room = (empty / "memory.policy").stat().st_size + 500
    first = policy_of(tmp_path, clock, max_bytes=room)
    for number in range(100):
        clock.now_s += 1
        first.access([name_of(number)])
    first.keep()
    assert room - 50 < (tmp_path / "memory.policy").stat().st_size <= room
    second = policy_of(tmp_path, max_bytes=room)
    known = [number for number in range(100) if second.explain(name_of(number)) is not None]
    assert known == list(range(100 - len(known), 100))
    assert len(known) > 10


def test_a_chunk_that_nobody_asked_for_grows_old_too() -> None:
    clock = Clock()
    policy = ChunkPolicy(BUDGET, clock=clock)
    policy.admit(name_of(1), SIZE)
    clock.now_s += 1000
    seen = policy.explain(name_of(1))
    assert seen is not None
    assert (seen.uses, seen.age_s) == (1, pytest.approx(1000, abs=0.1))


def test_two_policies_place_equal_names_differently() -> None:
    one, two = ChunkPolicy(BUDGET), ChunkPolicy(BUDGET)
    assert one._fingerprint(name_of(1)) != two._fingerprint(name_of(1))
    same_text = (ChunkKey(b"ab", b"c", "t"), ChunkKey(b"a", b"bc", "t"), ChunkKey(b"ab", b"c", "u"))
    assert len({one._fingerprint(each) for each in same_text}) == 3


def test_a_named_tenant_has_its_quota_however_many_others_came_first() -> None:
    policy = ChunkPolicy(
        100 * BUDGET, quota_of=lambda tenant: 2 * SIZE if tenant == "acme" else 0, named=["acme"]
    )
    for number in range(MAX_TENANTS + 10):
        policy.admit(name_of(number, f"tenant {number}"), SIZE)
    kept = [policy.admit(name_of(number, "acme"), SIZE) for number in range(3)]
    assert len(kept[2].evicted) + (not kept[2].kept) == 1


def test_quotas_hold_on_disk(tmp_path: Path) -> None:
    quota = 4000
    store = DiskStore(
        tmp_path,
        64 << 10,
        segment_bytes=4 << 10,
        policy=lambda size: ChunkPolicy(
            size, quota_of=lambda tenant: quota if tenant == "default" else 0
        ),
    )
    for number in range(20):
        store.write([stored(number, 1000)])
        held = sum(store.find(name).held_bytes for name in store)
        assert held <= quota
    assert len(store) == 3
    store.check_integrity()
    store.close()
