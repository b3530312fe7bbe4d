"""What cannot be split is refused by name; no engine is started."""

import pytest

from mcp_vllm.split.engine.stage import engine_config
from mcp_vllm.split.engine.support import SplitUnsupported, check_supported


@pytest.fixture(scope="module")
def config(tiny_model):
    return engine_config(str(tiny_model("llama")), ["--dtype", "float32"])


def test_a_llama_can_be_split(config):
    check_supported(config)


def test_a_model_that_computes_between_its_layers_is_refused(config, monkeypatch):
    facts = config.model_config.model_arch_config
    monkeypatch.setattr(facts, "architectures", ["SolarForCausalLM"])
    with pytest.raises(SplitUnsupported, match="computes between its layers"):
        check_supported(config)


def test_a_model_that_is_compiled_is_refused(tiny_model):
    compiled = engine_config(str(tiny_model("llama")), ["--no-enforce-eager"])
    with pytest.raises(SplitUnsupported, match="give --enforce-eager"):
        check_supported(compiled)
