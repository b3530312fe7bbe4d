"""A split engine with connector `mcp`: the stage's KV is in the chunks, too."""

import random

import pytest

from mcp_vllm.demo.pair import SHARED_CORES, START_DEADLINE_S, Pair
from tests.integration.engine_client import NEAR_TIE_BF16, complete
from tests.integration.engine_client import assert_same_or_near_tie as assert_same_completion
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
            assert_same_or_near_tie(answers, expected, NEAR_TIE_BF16)
        assert all(each.cached >= 320 for each in played.answers[1])


def test_a_stage_that_dies_among_requests_that_come_load_and_store(gemma_model):
    """A request that the worker has not seen when the loss shows must not be unknown to it."""
    rng = random.Random(4)
    made = [
        Request([rng.randrange(1000, 60_000) for _ in range(300 + 30 * i)], TOKENS, arrives=4 * i)
        for i in range(5)
    ]
    room = {"num_gpu_blocks_override": 208, "max_model_len": 480, "max_num_seqs": 3}
    whole = play(engine_of(gemma_model, **room, **CONNECTOR), made, made)
    for step in (9, 17):
        with stage_of(gemma_model, "6:12") as stage:
            stage.wait_ready()
            split = split_of("6:12", stage.address)
            kill = [Signal(step, stage.process.pid, "SIGKILL")]
            engine = engine_of(gemma_model, **room, **CONNECTOR, mcp_split=split)
            played = play(engine, made, made, signals=kill)
        assert "local layers took over" in played.log, played.log[-6000:]
        for answers, expected in zip(played.answers, whole.answers, strict=True):
            assert_same_or_near_tie(answers, expected, NEAR_TIE_BF16)


def test_a_session_moves_between_split_engines_with_what_the_stage_has_of_it(gemma_model, tmp_path):
    """Two `vllm serve`, each with its lease at one stage, and their agents."""
    rng = random.Random(3)
    prompt = [rng.randrange(1000, 60_000) for _ in range(700)]
    options = ("--max-model-len", "4096")
    with (
        stage_of(gemma_model, "6:12", "--leases", "2", vllm_args=options) as stage,
        Pair(tmp_path, SHARED_CORES) as pair,
    ):
        stage.wait_ready()
        split = split_of("6:12", stage.address)
        for host in pair.hosts.values():
            host.start_engine(gemma_model, ("--mcp-split", split, "--max-num-seqs", "8"))
            host.engine.wait_ready(START_DEADLINE_S)
        told = {"session_id": "alice"}
        first = complete(pair["A"].engine_url, prompt, 32, params=told)
        pair["A"].wait_until_stored("alice")
        longer = [*prompt, *first.tokens]
        moved = complete(pair["B"].engine_url, longer, 32, params=told)
        assert moved.params["imported_tokens"] >= 640
        stayed = complete(pair["A"].engine_url, longer, 32)
        assert_same_completion(stayed, moved, "after a move", NEAR_TIE_BF16)
        assert stage.metric("mcp_stage_leases") == 2
