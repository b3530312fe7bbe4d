"""A split engine gives the tokens of the whole one: same batches, same kernels, exact wire."""

import random

import pytest

from tests.integration.split_engine import Request, Result
from tests.integration.split_parts import (
    assert_same_tokens,
    engine_of,
    play,
    split_of,
    stage_of,
)
from tests.tiny_models import VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TOKENS = 64
LAYERS = {"llama": "1:3", "qwen3": "1:3", "gemma": "6:12"}
FORMS = {"llama": "raw", "qwen3": "packed", "gemma": "raw"}
# Of 12 requests 8 run at once; they outgrow these blocks, so that some are preempted.
BLOCKS = {"llama": 42, "qwen3": 42, "gemma": 200}


def requests(vocabulary: int) -> list[Request]:
    """12 prompts that arrive one after the other; 3 more are aborted: while waiting, in their
    prefill, and while they generate."""
    rng = random.Random(6)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(10, vocabulary) for _ in range(length)]

    lengths = (5, 40, 300, 17, 130, 64, 500, 33, 90, 280, 12, 200)
    made = [Request(prompt(length), TOKENS, arrives=i // 2) for i, length in enumerate(lengths)]
    for arrives, aborted in ((1, 2), (3, 6), (4, 30)):
        made.append(Request(prompt(150), TOKENS, arrives=arrives, aborted=aborted))
    return made


def sampled(prompts: list[Request]) -> list[Request]:
    """With seeds, and prompts that are prefilled in one piece: with a seed and in several, this
    vLLM's CPU build fails ("CPU Generator does not use offset")."""
    return [
        Request(each.prompt[:20], 32, temperature=0.9, seed=seed)
        for seed, each in enumerate(prompts[:6])
    ]


@pytest.fixture(params=["llama", "qwen3", "gemma"])
def family(request):
    return request.param


@pytest.fixture
def model(family, request):
    if family == "gemma":
        return request.getfixturevalue("gemma_model")
    return request.getfixturevalue("tiny_model")(family)


def test_tokens_are_those_of_the_whole_engine(model, family):
    vocabulary = 5000 if family == "gemma" else VOCAB_SIZE
    first = requests(vocabulary)
    shared = first[6].prompt  # in the prefix cache when the others come
    again = [
        Request(shared, 16),
        Request(shared, 8, arrives=6),
        Request(shared + first[3].prompt, 8, arrives=8),
    ]
    rounds = (first, again, sampled(first))
    engine = engine_of(model, num_gpu_blocks_override=BLOCKS[family])
    whole = play(engine, *rounds)
    assert whole.result is not None, whole.log[-5000:]
    with stage_of(model, LAYERS[family], name=f"identity-{family}") as stage:
        settings = {"mcp_split": split_of(LAYERS[family], stage.address, form=FORMS[family])}
        split = play(engine | settings, *rounds)
        assert split.result is not None, split.log[-5000:]
        assert stage.metric("mcp_stage_steps_total") > TOKENS
    for ours, reference in zip(split.answers, whole.answers, strict=True):
        assert_same_tokens(ours, reference)
    _check_that_it_was_hard(split.result)
    _check_that_the_middle_was_elsewhere(split.result, whole.result, LAYERS[family])


def _check_that_it_was_hard(result: Result) -> None:
    assert result.preemptions > 0
    assert all(each.cached > 400 for each in result.answers[1][1:])
    assert sum(each.aborted for each in result.answers[0]) == 3


def _check_that_the_middle_was_elsewhere(split: Result, whole: Result, layers: str) -> None:
    first, _, end = layers.partition(":")
    assert split.kv_layers == whole.kv_layers - (int(end) - int(first))
