"""A session that moves by each lossy tier, between real engines: marked, smaller, nearly as good.

With none allowed, the same engines' answers are identical (test_gemma_pair.py).
"""

import subprocess
import sys

import pytest

from mcp_vllm.codec import needs_calibration
from mcp_vllm.demo.document import research_ship_manual
from mcp_vllm.demo.pair import Pair
from mcp_vllm.demo.weights import ensure_gemma
from mcp_vllm.quality.location import find_calibration
from tests.integration.conftest import SETTINGS
from tests.integration.engine_client import complete, get_json
from tests.integration.identity import urls, wait_until_stored
from tests.waiting import wait_for

pytestmark = [pytest.mark.engine, pytest.mark.slow]
PROMPTS = [
    f"{research_ship_manual()[start:]}\n\nQuestion: What is the ship called?\nAnswer:"
    for start in (0, 700, 1400)
]
NUM_TOKENS = 32
# Least ratio on the wire, and least part of an answer's tokens that are the likeliest ones after
# the move, too: `mcp-vllm bench quality` has 98, 97 and 94 % (docs/codec.md); here are 96 tokens.
EXPECTED = {"near-lossless": (2.0, 0.93), "balanced": (3.5, 0.90), "small": (5.0, 0.85)}


@pytest.fixture(scope="module", params=list(EXPECTED))
def tier(request):
    return request.param


@pytest.fixture(scope="module")
def model(tier):
    """Gemma, calibrated where the tier asks for it: once on a machine, for some minutes."""
    path = ensure_gemma(progress=False)
    if needs_calibration(tier) and find_calibration(path) is None:
        command = [sys.executable, "-m", "mcp_vllm.cli.main", "codec", "calibrate", str(path)]
        subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="module")
def pair(tier, model, log_folder):
    settings = {**SETTINGS, "codec": {"lossy": [tier], "wire": tier}}
    with Pair(log_folder, settings) as pair:
        pair.start_engines(model)
        for host in pair.hosts.values():
            wait_for("the codecs", lambda host=host: tier in codecs_of(host))
        yield pair


def codecs_of(host) -> set[str]:
    """What the host's agent can use."""
    return {codec["name"] for codec in get_json(f"{host.agent_url}/v1/peers")["codecs"]}


def test_the_answer_is_nearly_the_same_and_the_session_is_marked(pair, tier):
    a, b = urls(pair)
    ratios, same = [], []
    for number, prompt in enumerate(PROMPTS):
        complete(a, prompt, 1)
        wait_until_stored(pair, "A")
        exact = complete(a, prompt, NUM_TOKENS)
        moved = complete(b, prompt, 1, params={"session_id": f"lossy-{number}"})
        assert moved.params["imported_tokens"] > 0
        ratios.append(moved.params["raw_bytes"] / moved.params["wire_bytes"])
        same.append(moved.tokens[0] == exact.tokens[0])
        for known in range(1, NUM_TOKENS):
            so_far = [*exact.prompt_ids, *exact.tokens[:known]]
            same.append(complete(b, so_far, 1).tokens[0] == exact.tokens[known])
        pair["B"].wait_until_stored(f"lossy-{number}")
        url = f"{pair['B'].agent_url}/v1/sessions/default/lossy-{number}"
        assert get_json(url)["loss"] == tier
    ratio, share = sum(ratios) / len(ratios), sum(same) / len(same)
    print(f"{tier}: ratio {ratio:.2f}, {100 * share:.1f} % of {len(same)} tokens the likeliest")
    least_ratio, least_share = EXPECTED[tier]
    assert ratio > least_ratio
    assert share >= least_share
