"""`mcp-vllm doctor`, without asking a real vLLM."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mcp_vllm.cli.main import app
from mcp_vllm.doctor import engine, probe
from mcp_vllm.doctor.check import fail, ok
from mcp_vllm.doctor.probe import Probe


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A vLLM in order, and a runtime folder of this test's own."""
    monkeypatch.setattr(engine, "check_version", lambda: ok("vllm", "vLLM 0.32.0"))
    monkeypatch.setattr(engine, "check_metadata_name", lambda: ok("vllm command", "there"))
    monkeypatch.setattr(engine, "check_plugin", lambda _: ok("plugin", "there"))
    monkeypatch.setattr(probe, "run_probes", lambda _: [Probe("cpu", "sha256", "ab")] * 2)
    # A Unix socket's path is short: pytest's own folders are too deep for one.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield


SMALL = json.dumps(
    {"host_cache_bytes": "1MiB", "agent": {"ram_bytes": "1MiB", "listen": "127.0.0.1:0"}}
)


@pytest.mark.usefixtures("healthy")
def test_all_well_exits_with_0_and_the_json_form_lists_every_check() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json", "--config", SMALL])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["ok"] is True
    assert {"vllm", "plugin", "block hash", "agent.listen", "agent.socket", "peers"} <= {
        check["name"] for check in answer["checks"]
    }


@pytest.mark.usefixtures("healthy")
def test_a_fail_exits_with_1_and_shows_the_remedy(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--config", SMALL, "--model", str(tmp_path / "no")])
    assert result.exit_code == 1
    assert "fail" in result.stdout
    assert "model weights" in result.stdout


@pytest.mark.usefixtures("healthy")
def test_a_bad_configuration_is_one_of_the_checks() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json", "--config", '{"peers_": []}'])
    assert result.exit_code == 1
    (broken,) = [c for c in json.loads(result.stdout)["checks"] if c["name"] == "configuration"]
    assert 'did you mean "peers"' in broken["found"]


@pytest.mark.usefixtures("healthy")
def test_without_vllm_nothing_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "check_version", lambda: fail("vllm", "vLLM is not installed", ""))
    monkeypatch.setattr(probe, "run_probes", None)
    result = CliRunner().invoke(app, ["doctor", "--json", "--config", SMALL])
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["platform"]["found"] == "vLLM is not installed"
    assert checks["block hash"]["status"] == "fail"
