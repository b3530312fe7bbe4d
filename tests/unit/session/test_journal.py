"""The journal of sessions against a dictionary: any changes, cuts and bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from mcp_vllm.session.journal import SessionJournal
from mcp_vllm.session.manifest import Manifest, SessionKey

MAX_BYTES = 40_000


def manifest(number: int, turns: int = 1, chunks: int = 3) -> Manifest:
    return Manifest(
        key=SessionKey("tenant", f"session {number}"),
        namespace=b"n" * 32,
        chains=[[bytes([turns % 256, chunk]) * 18 for chunk in range(chunks)]],
        num_tokens=turns,
        turns=turns,
        created_s=1.0,
        last_used_s=float(turns),
    )


def opened(folder: Path, before: list[Manifest] | None = None) -> SessionJournal:
    journal = SessionJournal(folder / "sessions.journal", MAX_BYTES)
    assert journal.load() == (before or [])
    return journal


def apply(journal: SessionJournal, held: dict[SessionKey, Manifest], change) -> None:
    key = change.key if isinstance(change, Manifest) else change
    held.pop(key, None)
    if isinstance(change, Manifest):
        held[key] = change
    if not journal.append([change]):
        journal.rewrite(held.values())


changes = st.one_of(
    st.builds(manifest, st.integers(0, 5), st.integers(1, 200), st.integers(0, 20)),
    st.builds(lambda number: SessionKey("tenant", f"session {number}"), st.integers(0, 5)),
)


@given(batches=st.lists(st.lists(changes, max_size=40), max_size=4))
@hypothesis_settings(max_examples=50, deadline=None)
def test_what_was_noted_is_there_for_the_next_agent(
    tmp_path_factory: pytest.TempPathFactory, batches
) -> None:
    folder = tmp_path_factory.mktemp("sessions")
    held: dict[SessionKey, Manifest] = {}
    for batch in batches:
        journal = opened(folder, list(held.values()))
        for change in batch:
            apply(journal, held, change)
            assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES
    opened(folder, list(held.values()))


def test_more_than_fits_keeps_the_newest(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    manifests = [manifest(number) for number in range(300)]
    journal.rewrite(manifests)
    kept = SessionJournal(tmp_path / "sessions.journal", MAX_BYTES).load()
    assert 10 < len(kept) < 300
    assert kept == manifests[-len(kept) :]


@given(at=st.integers(0, 1 << 20), bit=st.integers(0, 7))
@hypothesis_settings(max_examples=50, deadline=None)
def test_damage_costs_the_session_that_it_hit(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("sessions")
    manifests = [manifest(number) for number in range(10)]
    opened(folder).rewrite(manifests)
    path = folder / "sessions.journal"
    body = bytearray(path.read_bytes())
    body[at % len(body)] ^= 1 << bit
    path.write_bytes(body)
    left = SessionJournal(path, MAX_BYTES).load()
    assert len(left) == 9
    assert all(each in manifests for each in left)


@given(size=st.integers(0, 2000))
@hypothesis_settings(max_examples=50, deadline=None)
def test_a_file_that_ends_in_a_record_has_those_before(
    tmp_path_factory: pytest.TempPathFactory, size: int
) -> None:
    folder = tmp_path_factory.mktemp("sessions")
    manifests = [manifest(number) for number in range(10)]
    opened(folder).rewrite(manifests)
    path = folder / "sessions.journal"
    body = path.read_bytes()
    path.write_bytes(body[:size])
    journal = SessionJournal(path, MAX_BYTES)
    left = journal.load()
    assert left == manifests[: len(left)]
    assert len(left) >= min(size, len(body)) * 10 // len(body) - 1
    assert not journal.append([manifest(99)]), "it is rewritten first"
