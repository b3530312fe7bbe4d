"""Defaults, bounds and the rules between keys."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mcp_vllm.config import KNOWN_CODECS, AgentConfig, CodecConfig, Config, ConfigError


def load(**keys: object) -> Config:
    return Config.load(keys, environ={})


def test_a_tenant_has_its_own_quota_or_everybodys() -> None:
    quotas = [{"tenant": "acme", "ram_bytes": "4GiB"}, {"tenant": "free"}]
    tenants = load(tenants={"ram_bytes": "1GiB", "sessions": 7, "quotas": quotas}).tenants
    assert [tenants.ram_bytes_of(each) for each in ("acme", "free", "x")] == [4 << 30, 0, 1 << 30]
    assert [tenants.sessions_of(each) for each in ("acme", "free", "x")] == [0, 0, 7]
    with pytest.raises(ConfigError, match="listed twice"):
        load(tenants={"quotas": [{"tenant": "a"}, {"tenant": "a"}]})
    with pytest.raises(ConfigError, match="tenant"):
        load(tenants={"quotas": [{"ram_bytes": 1}]})


def test_defaults_are_those_of_one_host() -> None:
    config = load()
    assert config == Config()
    assert config.host_cache_bytes == 1 << 30
    assert config.peers == ()
    assert config.agent == AgentConfig()
    assert config.agent.ram_bytes == 4 << 30
    assert config.agent.landing_bytes == 64 << 20
    assert (config.agent.lookup_ms, config.agent.stall_ms, config.agent.load_ms) == (
        50,
        1000,
        10000,
    )
    assert config.codec == CodecConfig(name="lossless", level=3)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load().insecure = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 1 << 30), ("1.5MiB", 3 << 19), (2_000_000, 2_000_000)]
)
def test_sizes_take_units(text: object, size: int) -> None:
    assert load(host_cache_bytes=text).host_cache_bytes == size


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"version": 2}, "version: must be 1 (got 2)"),
        (
            {"host_cache_bytes": "1KiB"},
            "host_cache_bytes: must be greater than or equal to 1048576",
        ),
        ({"host_cache_bytes": "many"}, "host_cache_bytes: could not"),
        ({"peers": "a:1"}, "peers: must be a list (got 'a:1')"),
        ({"peers": ["a:1", "b"]}, 'peers[1]: "b" is not HOST:PORT'),
        ({"peers": ["a:0"]}, "peers[0]: "),
        ({"peers": ["a:1", "A:1"]}, 'peers: "a:1" is listed twice'),
        ({"agent": {"codec_threads": 65}}, "agent.codec_threads: must be less than or equal to 64"),
        ({"agent": {"lookup_ms": 0}}, "agent.lookup_ms: must be greater than or equal to 1"),
        ({"agent": {"socket": 3}}, "agent.socket: must be a path (got 3)"),
        ({"agent": 3}, "agent: must hold keys of its own, not 3"),
        ({"codec": {"level": 23}}, "codec.level: must be less than or equal to 22"),
        ({"codec": {"name": "zst"}}, 'codec.name: unknown codec "zst" (did you mean "zstd"?)'),
        ({"codec": {"name": "x"}}, 'codec.name: unknown codec "x" (known: raw, zstd, lossless)'),
    ],
)
def test_a_bad_value_is_refused_in_one_line_with_its_key(
    keys: dict[str, object], fault: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.load(keys, environ={})
    (line,) = caught.value.faults
    assert line.startswith(f"given mapping: {fault}")
    assert "\n" not in line


@pytest.mark.parametrize("listen", ["0.0.0.0:7077", "[::]:7077", "host.example.org:7077"])
def test_an_open_listen_address_without_insecure_is_refused_naming_both_keys(listen: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(agent={"listen": listen})
    (line,) = caught.value.faults
    assert line.startswith(f"given mapping: agent.listen: {listen} ")
    assert '"insecure: true"' in line
    assert load(agent={"listen": listen}, insecure=True).agent.listen == listen


def test_peers_may_be_given_as_a_tuple_and_are_kept_in_order() -> None:
    assert load(peers=("b:2", "a:1")).peers == ("b:2", "a:1")


CONFIGS = st.builds(
    Config,
    host_cache_bytes=st.integers(1 << 20, 1 << 50),
    peers=st.lists(st.integers(1, 65535).map("10.0.0.1:{}".format), unique=True, max_size=4).map(
        tuple
    ),
    insecure=st.just(True),
    agent=st.builds(
        AgentConfig,
        socket=st.none() | st.sampled_from([Path("/run/a.sock"), Path("tmp/ä b.sock")]),
        listen=st.sampled_from(["0.0.0.0:0", "[::1]:7077"]),
        codec_threads=st.integers(0, 64),
    ),
    codec=st.builds(CodecConfig, name=st.sampled_from(KNOWN_CODECS), level=st.integers(1, 22)),
)


@given(CONFIGS)
def test_a_child_process_reads_exactly_what_its_parent_wrote(config: Config) -> None:
    assert Config.from_json(config.to_json()) == config


def test_a_child_process_does_not_look_at_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCP_VLLM_INSECURE", "true")
    assert Config.from_json(Config().to_json()) == Config()


def test_json_that_is_not_ours_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="inline JSON: unknown key"):
        Config.from_json('{"nosuch": 1}')


TLS = {"certificate": "c.pem", "key": "k.pem", "ca": "ca.pem"}


def test_an_open_listen_address_is_fine_with_tls() -> None:
    assert load(agent={"listen": "0.0.0.0:7077"}, security={"tls": TLS}).security.tls.is_set


@pytest.mark.parametrize("missing", sorted(TLS))
def test_tls_needs_all_of_its_files(missing: str) -> None:
    tls = {name: path for name, path in TLS.items() if name != missing}
    with pytest.raises(ConfigError, match='needs "certificate", "key" and "ca"'):
        load(security={"tls": tls})


def test_a_token_for_far_peers_needs_tls() -> None:
    own = {"own_token_file": "token"}
    assert load(peers=["127.0.0.1:7077"], security=own)
    assert load(peers=["192.0.2.1:7077"], security={**own, "tls": TLS})
    with pytest.raises(ConfigError, match="in the clear") as caught:
        load(peers=["192.0.2.1:7077"], security=own)
    assert "security.own_token_file" in str(caught.value)
