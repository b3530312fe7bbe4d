"""What ships beside the schema: ready configurations and the generated page."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from mcp_vllm.config import Config, loader
from mcp_vllm.config.docs import PAGES
from mcp_vllm.config.keys import keys_of
from mcp_vllm.config.render import render
from mcp_vllm.config.source import read_source
from mcp_vllm.config.split import SplitConfig, StageConfig

ROOT = Path(__file__).parents[3]
SPLIT = {"edge-cloud": SplitConfig, "stage": StageConfig}
SHIPPED = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem not in SPLIT)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_settings_is_what_the_schema_says(name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert page == PAGES[name](), f"docs/{name} is stale: run `make docs`"


@pytest.mark.parametrize("schema", [Config, SplitConfig, StageConfig])
def test_every_key_is_explained(schema: type[BaseModel]) -> None:
    assert all(key.field.description for key in keys_of(schema))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_configuration_loads(path: Path) -> None:
    assert Config.load(path, environ={}).version == 1


@pytest.mark.parametrize("name", SPLIT)
def test_a_shipped_configuration_of_a_split_loads(name: str) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    assert loader.load(SPLIT[name], path, flags={}, environ={}).config.version == 1


def test_single_host_listens_on_loopback_and_has_no_peer() -> None:
    config = Config.load(ROOT / "configs" / "single-host.yaml", environ={})
    assert config.peers == ()
    assert config.agent.listen == "127.0.0.1:0"
    assert config.agent.socket is None


def test_two_peers_has_a_standalone_agent_and_one_peer() -> None:
    config = Config.load(ROOT / "configs" / "two-peers.yaml", environ={})
    assert config.peers == ("192.0.2.2:7077",)
    assert config.agent.listen == "192.0.2.1:7077"
    assert config.agent.socket == Path("/run/mcp-vllm/agent.sock")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_shown_reads_back_as_the_same_configuration(path: Path, tmp_path: Path) -> None:
    loaded = loader.load(Config, path, flags={}, environ={"MCP_VLLM_AGENT__STALL_MS": "7000"})
    shown = tmp_path / "shown.yaml"
    shown.write_text(render(loaded), encoding="utf-8")
    assert Config.load(shown, environ={}) == loaded.config
    assert "stall_ms: 7000" in render(loaded)
    assert render(loaded).count("# environment MCP_VLLM_AGENT__STALL_MS") == 1


def test_a_shipped_file_names_no_key_twice_and_is_a_mapping() -> None:
    assert all(read_source(path)[1] for path in SHIPPED)


def test_mtls_listens_for_others_without_being_insecure() -> None:
    config = Config.load(ROOT / "configs" / "mtls.yaml", environ={})
    assert not config.insecure
    assert config.agent.listen == "192.0.2.1:7077"
    assert config.security.tls.certificate == Path("/etc/mcp-vllm/192.0.2.1.pem")
    assert config.security.token_keys is not None
