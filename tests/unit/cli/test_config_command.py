"""`mcp-vllm config`."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mcp_vllm.cli.main import COMMANDS, app

CONFIGS = Path(__file__).parents[3] / "configs"


def test_check_prints_the_settings_with_the_source_of_those_that_were_set() -> None:
    path = CONFIGS / "single-host.yaml"
    result = CliRunner().invoke(
        app, ["config", "check", str(path)], env={"MCP_VLLM_AGENT__LOAD_MS": "99"}
    )
    assert result.exit_code == 0
    lines = result.output.splitlines()
    (load_ms,) = [line for line in lines if "load_ms" in line]
    (landing,) = [line for line in lines if "landing_bytes" in line]
    ram, _ = [line for line in lines if "ram_bytes" in line]  # the agent's, a tenant's
    assert load_ms.endswith("# environment MCP_VLLM_AGENT__LOAD_MS")
    assert ram.endswith(f"# {path}")
    assert landing == "  landing_bytes: 64MiB"


def test_check_of_a_bad_file_prints_one_line_and_exits_with_1(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("peers_: []\n", encoding="utf-8")
    result = CliRunner().invoke(app, ["config", "check", str(path)])
    assert result.exit_code == 1
    assert result.output == f'{path}: unknown key "peers_" (did you mean "peers"?)\n'


def test_show_prints_the_defaults() -> None:
    result = CliRunner().invoke(app, ["config", "show"])
    assert result.exit_code == 0
    assert "host_cache_bytes: 1GiB" in result.output
    assert "#" not in result.output


def test_help_lists_every_command_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcp_vllm.cli.main.importlib", None)
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.output for name in COMMANDS)


def test_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.startswith("mcp-vllm ")


def test_an_unknown_command_is_refused() -> None:
    assert CliRunner().invoke(app, ["nosuch"]).exit_code == 2
