"""A small random model of the llama family: what is imported is what was computed."""

import pytest

from tests.integration.conftest import start_pair
from tests.integration.identity import check_concurrent, check_pages_and_tokens
from tests.integration.prompts import prompts

pytestmark = pytest.mark.engine
NUM_CHARS = 1900  # one token a byte


@pytest.fixture(scope="module")
def pair(tiny_model, log_folder):
    yield from start_pair(tiny_model("llama"), log_folder)


def test_imported_pages_and_tokens_equal_the_sources(pair):
    check_pages_and_tokens(pair, prompts(8, NUM_CHARS))


@pytest.mark.slow
def test_eight_at_once_give_the_same_tokens(pair):
    check_concurrent(pair, [f"At once. {prompt}" for prompt in prompts(8, NUM_CHARS)])
