"""A split engine with connector `mcp`: the stage's KV is in the chunks, too."""

import random

import pytest

from tests.integration.split_engine import Request, Signal
from tests.integration.split_parts import (
    assert_same_or_near_tie,
    assert_same_tokens,
    engine_of,
    play,
    split_of,
    stage_of,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TOKENS = 24
# Of 32 tokens, for each of six groups: room for one of the prompts at a time, so that each round
# finds none of them.
BLOCKS = {"num_gpu_blocks_override": 104, "max_model_len": 480, "max_num_seqs": 1}
CONNECTOR = {"kv_connector": "mcp", "mcp_config": {"host_cache_bytes": "256MiB"}}


def requests(seed: int, count: int = 3) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request([rng.randrange(1000, 60_000) for _ in range(400 + 16 * i)], TOKENS, arrives=40 * i)
        for i in range(count)
    ]


def test_a_split_engine_finds_what_it_computed_before_in_its_host_cache(gemma_model):
    made = requests(1)
    # It loads the same blocks and computes the same rest: so the same tokens, not near-ties.
    whole = play(engine_of(gemma_model, **BLOCKS, **CONNECTOR), made, made)
    with stage_of(gemma_model, "6:12") as stage:
        stage.wait_ready()
        split = split_of("6:12", stage.address)
        played = play(engine_of(gemma_model, **BLOCKS, **CONNECTOR, mcp_split=split), made, made)
    for answers, expected in zip(played.answers, whole.answers, strict=True):
        assert_same_tokens(answers, expected)
        assert [each.cached for each in answers] == [each.cached for each in expected]
    assert all(each.cached >= 320 for each in played.answers[1])


def test_a_stage_that_dies_leaves_no_wrong_block_behind(gemma_model):
    """Loads and stores are under way in nearly every step; local layers take over."""
    made = requests(2)
    whole = play(engine_of(gemma_model, **BLOCKS, **CONNECTOR), made, made)
    for step in (3, 41, 43):
        with stage_of(gemma_model, "6:12") as stage:
            stage.wait_ready()
            split = split_of("6:12", stage.address)
            kill = [Signal(step, stage.process.pid, "SIGKILL")]
            engine = engine_of(gemma_model, **BLOCKS, **CONNECTOR, mcp_split=split)
            played = play(engine, made, made, signals=kill)
        assert "local layers took over" in played.log, played.log[-6000:]
        for answers, expected in zip(played.answers, whole.answers, strict=True):
            assert_same_or_near_tie(answers, expected)
        assert all(each.cached >= 320 for each in played.answers[1])
