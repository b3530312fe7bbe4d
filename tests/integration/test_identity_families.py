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


@pytest.fixture(scope="module", params=["llama", "qwen3", "deepseek_v2"])
def pair(request, tiny_model, log_folder):
    model = tiny_model(request.param)
    yield from start_pair(model, log_folder, FLOAT32)


def test_imported_pages_and_tokens_equal_the_sources(pair):
    check_pages_and_tokens(pair, prompts(8, NUM_CHARS))


def test_eight_at_once_give_the_same_tokens(pair):
    at_once = [f"At once. {prompt}" for prompt in prompts(8, NUM_CHARS)]
    check_concurrent(pair, at_once)
