"""Weights identity: what changes it, what does not, and what its cache may be trusted with."""

import json
import os
import shutil
from pathlib import Path

import pytest

from mcp_vllm.session import weights_identity as module
from mcp_vllm.session.weights_identity import (
    WeightsNotFound,
    WeightsUnreadable,
    weights_identity,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_bytes(bytes(range(256)) * 20)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"second" * 1000)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_SETTLED_NS", -1)  # the files of a test are always fresh
    return tmp_path / "cache"


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    hash_file = module._hash_file

    def counting(path: Path) -> str:
        read.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(module, "_hash_file", counting)
    return read


@pytest.mark.parametrize("position", [0, 1, 2559, 5118, 5119])
@pytest.mark.parametrize("bit", [1, 128])
def test_one_flipped_bit_anywhere_changes_the_identity(
    model: Path, position: int, bit: int
) -> None:
    before = weights_identity(model, None)
    path = model / "model-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)
    assert weights_identity(model, None) != before


def test_bytes_moved_from_one_file_to_the_next_change_the_identity(model: Path) -> None:
    before = weights_identity(model, None)
    first, second = sorted(model.glob("*.safetensors"))
    whole = first.read_bytes() + second.read_bytes()
    first.write_bytes(whole[:100])
    second.write_bytes(whole[100:])
    assert weights_identity(model, None) != before


def test_renaming_or_copying_the_folder_keeps_the_identity(model: Path, cache: Path) -> None:
    before = weights_identity(model, cache)
    copy = model.parent / "copy"
    shutil.copytree(model, copy)
    assert weights_identity(copy, cache) == before
    renamed = model.rename(model.parent / "renamed")
    assert weights_identity(renamed, cache) == before


def test_files_that_are_not_weights_do_not_matter(model: Path) -> None:
    before = weights_identity(model, None)
    (model / "config.json").write_text('{"other": 1}')
    (model / "pytorch_model.bin").write_bytes(b"an older format beside the safetensors")
    assert weights_identity(model, None) == before


@pytest.mark.parametrize("name", ["model.gguf", "pytorch_model.bin", "consolidated.00.pt"])
def test_other_formats_are_found_when_there_is_no_safetensors_file(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(b"weights")
    identity = weights_identity(tmp_path, None)
    (tmp_path / name).write_bytes(b"Weights")
    assert weights_identity(tmp_path, None) != identity


def test_a_single_file_is_known_by_its_content_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    before = weights_identity(path, None)
    assert weights_identity(path.rename(tmp_path / "other.gguf"), None) == before


def test_cache_hit_reads_no_file(model: Path, cache: Path, files_read: list[str]) -> None:
    before = weights_identity(model, cache)
    assert len(files_read) == 2
    assert weights_identity(model, cache) == before
    assert len(files_read) == 2


def test_without_a_cache_every_call_reads(model: Path, files_read: list[str]) -> None:
    weights_identity(model, None)
    weights_identity(model, None)
    assert len(files_read) == 4


def test_changed_file_of_same_size_and_mtime_is_read_again(
    model: Path, cache: Path, files_read: list[str]
) -> None:
    before = weights_identity(model, cache)
    path = model / "model-00002-of-00002.safetensors"
    times = path.stat()
    path.write_bytes(b"SECOND" * 1000)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights_identity(model, cache) != before
    assert files_read[2:] == [path.name]


def test_file_changed_within_the_last_second_is_not_cached(
    model: Path, tmp_path: Path, files_read: list[str]
) -> None:
    weights_identity(model, tmp_path / "cache")
    weights_identity(model, tmp_path / "cache")
    assert len(files_read) == 4


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b'{"version": 2, "files": {}}',
        b'{"version": 1, "files": [1]}',
        b'{"version": 1, "files": {"x": {"state": {"size": 1}, "digest": "00"}}}',
        b"[" * 100_000,
    ],
)
def test_damaged_cache_file_is_ignored_and_rewritten(
    model: Path, cache: Path, content: bytes, files_read: list[str]
) -> None:
    before = weights_identity(model, cache)
    cache_file = next(cache.iterdir())
    cache_file.write_bytes(content)
    assert weights_identity(model, cache) == before
    assert len(files_read) == 4
    assert len(json.loads(cache_file.read_text())["files"]) == 2
    assert list(cache.iterdir()) == [cache_file]


def test_cache_entry_with_a_malformed_digest_is_not_used(model: Path, cache: Path) -> None:
    before = weights_identity(model, cache)
    cache_file = next(cache.iterdir())
    content = json.loads(cache_file.read_text())
    for entry in content["files"].values():
        entry["digest"] = "00"
    cache_file.write_text(json.dumps(content))
    assert weights_identity(model, cache) == before


def test_cache_folder_that_cannot_be_written_does_no_harm(model: Path, tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("a file where the folder should be")
    assert weights_identity(model, occupied) == weights_identity(model, None)


def test_deleted_models_leave_the_cache(model: Path, cache: Path) -> None:
    weights_identity(model, cache)
    other = model.parent / "other.gguf"
    other.write_bytes(b"other")
    shutil.rmtree(model)
    weights_identity(other, cache)
    content = json.loads(next(cache.iterdir()).read_text())
    assert list(content["files"]) == [str(other)]


def test_file_that_changes_while_it_is_read_is_an_error_that_names_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow(path: Path) -> str:
        with path.open("ab") as file:
            file.write(b"more")
        return "00"

    monkeypatch.setattr(module, "_hash_file", grow)
    with pytest.raises(WeightsUnreadable, match="model-00001-of-00002"):
        weights_identity(model, None)


@pytest.mark.parametrize("exists", [True, False])
def test_folder_without_weights_is_an_error_that_names_it(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "empty-model"
    if exists:
        folder.mkdir()
    with pytest.raises(WeightsNotFound, match="empty-model"):
        weights_identity(folder, None)
