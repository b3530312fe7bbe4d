"""Layers, sources and the faults that name them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_vllm.config import Config, ConfigError
from mcp_vllm.errors import McpError


def write(folder: Path, text: str, name: str = "two-peers.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def faults(source: object, **environ: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        Config.load(source, environ=environ)  # type: ignore[arg-type]
    return caught.value.faults


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "peers: [file:1]\nagent: {stall_ms: 11, load_ms: 12}\n")
    environ = {"MCP_VLLM_PEERS": "env:1, env:2", "MCP_VLLM_AGENT__LOAD_MS": "13", "HOME": "/"}
    by_file = Config.load(path, environ={})
    by_environ = Config.load(path, environ=environ)
    by_flags = Config.load(path, peers=["flag:1"], environ=environ)
    assert by_file.peers == ("file:1",)
    assert by_environ.peers == ("env:1", "env:2")
    assert by_flags.peers == ("flag:1",)
    assert (by_file.agent.stall_ms, by_file.agent.load_ms) == (11, 12)
    assert (by_environ.agent.stall_ms, by_environ.agent.load_ms) == (11, 13)
    assert by_flags.agent.lookup_ms == 50


def test_the_process_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCP_VLLM_AGENT__LISTEN", "127.0.0.1:1")
    assert Config.load().agent.listen == "127.0.0.1:1"


def test_yaml_json_and_inline_json_say_the_same(tmp_path: Path) -> None:
    keys = {"peers": ["a:1"], "agent": {"ram_bytes": "2GiB"}}
    text = json.dumps(keys)
    sources: list[object] = [
        write(tmp_path, "peers:\n- a:1\nagent:\n  ram_bytes: 2GiB\n"),
        write(tmp_path, text, "c.json"),
        str(write(tmp_path, text, "d.json")),
        "  " + text,
        keys,
    ]
    first, *others = [Config.load(each, environ={}) for each in sources]  # type: ignore[arg-type]
    assert all(each == first for each in others)


@pytest.mark.parametrize("text", ["", "# nothing\n", "agent:\n  # stall_ms: 5\n"])
def test_a_file_or_section_of_comments_only_leaves_the_defaults(tmp_path: Path, text: str) -> None:
    assert Config.load(write(tmp_path, text), environ={}) == Config()


def test_an_unknown_key_names_the_file_and_the_nearest_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "peers_: [a:1]\n")
    assert faults("two-peers.yaml") == (
        'two-peers.yaml: unknown key "peers_" (did you mean "peers"?)',
    )


@pytest.mark.parametrize(
    ("keys", "remark"),
    [
        ({"agent": {"listn": 1}}, '"agent.listn" (did you mean "agent.listen"?)'),
        ({"listen": 1}, '"listen" (did you mean "agent.listen"?)'),
        ({"agent": {"level": 1}}, '"agent.level" (did you mean "codec.level"?)'),
        ({"agent": {"xyzzy": 1}}, '"agent.xyzzy" (known: agent.socket, agent.listen,'),
        ({"agnt": {"listen": 1}}, '"agnt" (did you mean "agent"?)'),
        (
            {"xyzzy": 1},
            '"xyzzy" (known: version, host_cache_bytes, host_cache_policy, short_polls, peers, '
            "insecure, discovery, replication, agent, codec, tenants, security)",
        ),
        ({1: 1}, '"1" (known: '),
    ],
)
def test_an_unknown_key_is_looked_for_in_its_section_then_elsewhere(
    keys: dict[str, object], remark: str
) -> None:
    (line,) = faults(keys)
    assert line.startswith(f"given mapping: unknown key {remark}")


def test_an_unknown_variable_names_the_nearest_one() -> None:
    assert faults(None, MCP_VLLM_PEER="a:1") == (
        'environment: unknown variable MCP_VLLM_PEER (did you mean "MCP_VLLM_PEERS"?)',
    )


def test_a_bad_variable_is_named_as_the_source() -> None:
    (line,) = faults(None, MCP_VLLM_CODEC__LEVEL="high")
    assert line.startswith(
        "environment MCP_VLLM_CODEC__LEVEL: codec.level: must be a valid integer"
    )


def test_a_bad_item_of_a_list_is_named_with_its_place() -> None:
    quotas = [{"tenant": "a"}, {"tenant": "b", "ram": 1}]
    (line,) = faults({"tenants": {"quotas": quotas}})
    assert line == "given mapping: tenants.quotas[1].ram: unknown key (got 1)"


def test_a_bad_flag_is_named_as_the_source() -> None:
    with pytest.raises(ConfigError, match=r'^--mcp-peer: peers\[0\]: "a" is not HOST:PORT$'):
        Config.load(peers=["a"], environ={})


def test_an_empty_variable_counts_as_not_set() -> None:
    assert Config.load({"peers": ["a:1"]}, environ={"MCP_VLLM_PEERS": ""}).peers == ("a:1",)


def test_every_fault_is_reported_on_a_line_of_its_own() -> None:
    found = faults({"version": 3, "codec": {"name": "gzip", "level": 0}})
    assert [line.split(": ")[1] for line in found] == ["version", "codec.name", "codec.level"]
    assert isinstance(ConfigError(found), McpError)
    assert str(ConfigError(found)) == "\n".join(found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n", "must hold keys and values, not list"),
        ("just text", "must hold keys and values, not str"),
        ("peers: [a:1]\npeers: [b:1]\n", 'key "peers" is given twice'),
        ("agent:\n  load_ms: 1\n  load_ms: 2\n", 'key "load_ms" is given twice'),
        ("agent: [\n", "is not YAML"),
        ("a: \x00", "is not YAML"),
        ("? [a]\n: 1\n", "is not YAML"),
    ],
)
def test_text_that_is_not_a_strict_yaml_mapping_is_refused(
    tmp_path: Path, text: str, says: str
) -> None:
    (line,) = faults(write(tmp_path, text))
    assert line.startswith(str(tmp_path / "two-peers.yaml"))
    assert says in line
    assert "\n" not in line


def test_json_with_a_key_given_twice_is_refused() -> None:
    assert 'key "peers" is given twice' in faults('{"peers": [], "peers": []}')[0]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nosuch.yaml"
    assert faults(missing) == (f"{missing}: cannot be read: no such file or directory",)
    assert "is a directory" in faults(tmp_path)[0]
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\xfd")
    assert "is not a UTF-8 text file" in faults(binary)[0]


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from([*Config.model_fields, "listen", "name", "level", "socket", "x"])


@given(st.dictionaries(NAMES, TREES | st.dictionaries(NAMES, TREES, max_size=3), max_size=4))
def test_any_mapping_loads_or_raises_one_line_faults(tree: dict[str, object]) -> None:
    found: tuple[str, ...] = ("loaded",)
    try:
        Config.load(tree, environ={})
    except ConfigError as error:
        found = error.faults
    assert found
    assert all(len(line.splitlines()) == 1 for line in found)


def test_a_key_with_a_line_break_is_reported_on_one_line() -> None:
    (line,) = faults({"agent": {"a\nb": 1}})
    assert line.startswith(r'given mapping: unknown key "agent.a\nb" (')
