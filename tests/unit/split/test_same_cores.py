"""Whether two processes have the same cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mcp_vllm.split import same_cores
from mcp_vllm.split.same_cores import has_cores, name_cores

pytestmark = pytest.mark.skipif(not name_cores(), reason="this machine does not say")
_TELL = "from mcp_vllm.split.same_cores import name_cores; print(name_cores())"
_NARROWED = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + _TELL


def told_by(program: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return ran.stdout.strip()


def test_another_process_with_the_same_cores() -> None:
    assert has_cores(told_by(_TELL))


@pytest.mark.skipif(len(same_cores._CORES) < 2, reason="there is one core")
def test_another_process_with_fewer_cores() -> None:
    assert not has_cores(told_by(_NARROWED))


def test_another_name_each_time() -> None:
    assert name_cores() != name_cores()


@pytest.mark.parametrize("name", ["", ":", "salt", "salt:00", "s\u00e4lt:00"])
def test_names_of_nobody(name: str) -> None:
    assert not has_cores(name)


def test_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = name_cores()
    boot = tmp_path / "boot_id"
    boot.write_text("another\n")
    monkeypatch.setattr(same_cores, "_BOOT_ID", boot)
    assert not has_cores(ours)


def test_a_machine_that_does_not_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = name_cores()
    monkeypatch.setattr(same_cores, "_BOOT_ID", tmp_path / "none")
    assert name_cores() == ""
    assert not has_cores("")
    assert not has_cores(ours)
