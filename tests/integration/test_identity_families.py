"""Small random models of three attention families: what is imported is what was computed.

In float32, so that a near-tie is one of the model's and not of the logits' rounding.
"""

import pytest

from tests.integration.conftest import start_pair
from tests.integration.engine_client import FLOAT32
from tests.integration.identity import check_concurrent, check_pages_and_tokens
from tests.integration.prompts import prompts

pytestmark = pytest.mark.engine
NUM_CHARS = 1900  # one token a byte
# vLLM's other MLA backend, its choice where there are matrix tiles, takes no float32.
FLAGS = {"deepseek_v2": ("--attention-backend", "CPU_MLA")}


@pytest.fixture(scope="module", params=["llama", "qwen3", "deepseek_v2"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pair(family, tiny_model, log_folder):
    yield from start_pair(tiny_model(family), log_folder, (*FLOAT32, *FLAGS.get(family, ())))


def test_imported_pages_and_tokens_equal_the_sources(pair):
    check_pages_and_tokens(pair, prompts(8, NUM_CHARS))


def test_eight_at_once_give_the_same_tokens(pair, family):
    if family == "deepseek_v2":
        pytest.skip(
            "vLLM 0.32's MLA on CPU gives other logits in a batch, without us too: in float32 the "
            "gap of the top two moved by up to 1.57, and all of 8 prompts took another turn"
        )
    check_concurrent(pair, [f"At once. {prompt}" for prompt in prompts(8, NUM_CHARS)])
