"""Engines that must not exchange blocks do not, and say which field differs."""

import pytest

from mcp_vllm.demo.pair import START_DEADLINE_S, Pair
from tests.integration.conftest import SETTINGS
from tests.integration.engine_client import complete, counters
from tests.integration.prompts import prompts
from tests.waiting import wait_for

pytestmark = pytest.mark.engine
NUM_CHARS = 1500


@pytest.fixture(scope="module")
def hosts(tiny_model, log_folder):
    """A: seed 0 in bfloat16; B: the same model in float32; C: another model of the same shape."""
    with Pair(log_folder, SETTINGS, names=("A", "B", "C")) as pair:
        pair["A"].start_engine(tiny_model("llama", 0))
        pair["B"].start_engine(tiny_model("llama", 0), ("--dtype", "float32"))
        pair["C"].start_engine(tiny_model("llama", 1))
        for host in pair.hosts.values():
            host.engine.wait_ready(START_DEADLINE_S)
        yield pair


@pytest.mark.parametrize(("name", "field"), [("B", "dtype"), ("C", "model.weights")])
def test_a_different_fingerprint_is_a_miss_and_the_log_names_the_field(hosts, name, field):
    prompt = f"For {name}. {prompts(1, NUM_CHARS)[0]}"
    complete(hosts["A"].engine.base_url, prompt, 2)
    wait_for("A to store", lambda: counters(hosts["A"].agent_url)["mcp_agent_chunks"] > 0)
    answer = complete(hosts[name].engine.base_url, prompt, 2)
    assert answer.params["imported_tokens"] == 0
    wait_for(
        f"{field} in the agent's log",
        lambda: (
            f"cannot exchange blocks with us: {field}: ours is"
            in hosts[name].agent.log_path.read_text()
        ),
    )
    assert counters(hosts[name].agent_url)["mcp_agent_fingerprint_mismatches_total"] >= 1
    assert counters(hosts["A"].agent_url)["mcp_agent_sent_chunks_total"] == 0
