"""The command line of a real `vllm`: our flags are there, and faults are refused in one line."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")


def vllm(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*VLLM, *args], capture_output=True, text=True, timeout=300, check=False)


def test_help_shows_the_flags_in_a_group_of_their_own():
    result = vllm("serve", "--help=MCPConfig")
    assert result.returncode == 0
    for flag in (
        "--kv-connector NAME",
        "--mcp-config FILE|JSON",
        "--mcp-peer HOST:PORT",
        "--mcp-split FILE|JSON",
    ):
        assert flag in result.stdout


def test_an_unknown_key_is_refused_in_one_line_that_names_the_nearest(tmp_path):
    config = tmp_path / "two-peers.yaml"
    config.write_text("peers_: ['127.0.0.1:1']\n")
    result = vllm("serve", "m", "--kv-connector", "mcp", "--mcp-config", str(config))
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert 'unknown key "peers_" (did you mean "peers"?)' in last
    assert "Traceback" not in result.stderr


def test_an_unknown_codec_is_refused_in_one_line():
    config = '{"codec": {"name": "zstdd"}}'
    result = vllm("serve", "m", "--kv-connector", "mcp", "--mcp-config", config)
    assert result.returncode != 0
    assert 'unknown codec "zstdd" (did you mean "zstd"?)' in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "both"),
    [
        (
            ("--kv-connector", "mcp", "--kv-transfer-config",
             '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'),
            ("--kv-connector", "--kv-transfer-config"),
        ),
        (("--mcp-peer", "127.0.0.1:1"), ("--mcp-peer", "--kv-connector mcp")),
        (
            ("--mcp-split", '{"layers": "1:3", "stages": ["127.0.0.1:1"]}', "--async-scheduling"),
            ("--mcp-split", "--async-scheduling"),
        ),
    ],
)  # fmt: skip
def test_contradictory_flags_are_an_error_that_names_both(tiny_model, args, both):
    result = vllm("serve", str(tiny_model("llama")), *args)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert all(flag in last for flag in both)


def test_an_unknown_connector_gives_vllms_own_error(tiny_model):
    result = vllm("serve", str(tiny_model("llama")), "--kv-connector", "nosuch")
    assert result.returncode != 0
    assert "Unsupported connector type: nosuch" in result.stdout + result.stderr
