"""The files of a split: what they say, and what they refuse."""

import pytest

from mcp_vllm.config import ConfigError
from mcp_vllm.config.split import SplitConfig, StageConfig, parse_layers

LOCAL = ["127.0.0.1:7090"]
TLS = {"certificate": "c.pem", "key": "k.pem", "ca": "ca.pem"}


def test_layers_are_the_first_and_the_one_after_the_last():
    assert parse_layers("4:14") == (4, 14)
    assert SplitConfig.load({"layers": "4:14", "stages": LOCAL}).span == (4, 14)


@pytest.mark.parametrize("text", ["", "4", "4-14", "14:4", "4:4", "0:3", "-1:3", "a:b", "1:99999"])
def test_layers_that_cannot_be_are_refused(text):
    with pytest.raises(ValueError, match=r"must begin|is not FIRST:END"):
        parse_layers(text)


def test_activations_travel_in_the_clear_on_this_machine_only():
    far = {"layers": "1:3", "stages": ["gpu.example:7090"]}
    with pytest.raises(ConfigError, match=r'gpu\.example:7090 in the clear: set "tls"'):
        SplitConfig.load(far)
    assert SplitConfig.load(far | {"insecure": True})
    assert SplitConfig.load(far | {"tls": TLS}).tls.is_set


def test_a_stage_that_others_can_reach_needs_tls():
    flags = {"layers": "1:3", "listen": "0.0.0.0:7090"}
    with pytest.raises(ConfigError, match="can be reached from other machines and has no TLS"):
        StageConfig.load(None, flags)
    assert StageConfig.load({"insecure": True}, flags)
    assert StageConfig.load({"security": {"tls": TLS}}, flags)


def test_options_of_the_command_line_win_over_the_file():
    config = StageConfig.load(
        {"layers": "1:3", "leases": 4}, {"layers": "2:3", "leases": None, "kv_bytes": "2GiB"}
    )
    assert (config.layers, config.leases, config.kv_bytes) == ("2:3", 4, 2 << 30)


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r'unknown key "stage" .*"stages"'):
        SplitConfig.load({"layers": "1:3", "stage": LOCAL})


def test_a_configuration_survives_the_way_to_the_engine_core():
    config = SplitConfig.load({"layers": "1:3", "stages": LOCAL, "form": "fold", "lost_ms": 500})
    assert SplitConfig.load(config.model_dump(mode="json")) == config
