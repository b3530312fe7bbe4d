"""What a prompt costs an engine, fitted to its steps."""

import math
import random

import pytest

from mcp_vllm.link.prefill import MIN_TOKENS, PrefillCost, PrefillMeter, contexts_of

TRUE = PrefillCost(step_s=0.004, token_s=2e-4, context_s=3e-8, step_tokens=512)


def step_s(cost: PrefillCost, start: int, end: int) -> float:
    tokens, contexts = end - start, contexts_of(start, end)
    return cost.step_s + cost.token_s * tokens + cost.context_s * contexts


def prompts_through(meter: PrefillMeter, cost: PrefillCost, count: int, noise: float = 0.0) -> None:
    """Prompts of many lengths, in chunks as an engine schedules them."""
    chance = random.Random(0)
    for _ in range(count):
        length = chance.randint(64, 4000)
        for start in range(0, length, cost.step_tokens):
            end = min(length, start + cost.step_tokens)
            seconds = step_s(cost, start, end) * (1 + chance.uniform(-noise, noise))
            meter.note(end - start, contexts_of(start, end), seconds)


def test_a_prompt_takes_its_steps_tokens_and_contexts():
    assert TRUE.seconds(0, 1024) == pytest.approx(2 * 0.004 + 1024 * 2e-4 + 3e-8 * 1024**2 / 2)
    assert TRUE.seconds(512, 1024) == pytest.approx(TRUE.seconds(0, 1024) - TRUE.seconds(0, 512))
    assert TRUE.seconds(700, 700) == TRUE.seconds(700, 600) == 0.0


def test_the_model_behind_the_steps_is_found():
    meter = PrefillMeter(512)
    prompts_through(meter, TRUE, 20)
    for end in (100, 1000, 4000):
        assert meter.cost.seconds(0, end) == pytest.approx(TRUE.seconds(0, end), rel=0.03)


def test_noise_of_a_fifth_costs_no_more_than_that():
    meter = PrefillMeter(512)
    prompts_through(meter, TRUE, 20, noise=0.2)
    assert meter.cost.seconds(0, 2000) == pytest.approx(TRUE.seconds(0, 2000), rel=0.2)


def test_nothing_is_claimed_of_a_few_tokens():
    meter = PrefillMeter(512)
    meter.note(MIN_TOKENS - 1, 0.0, 1.0)
    assert meter.cost is None
    meter.note(1, 0.0, 0.01)
    assert meter.cost is not None


def test_prompts_of_one_size_are_enough():
    meter = PrefillMeter(2048)
    for _ in range(5):
        meter.note(300, contexts_of(0, 300), 0.3)
    assert meter.cost.seconds(0, 300) == pytest.approx(0.3, rel=0.01)


def test_one_stalled_step_hardly_counts():
    meter = PrefillMeter(512)
    prompts_through(meter, TRUE, 10)
    before = meter.cost.seconds(0, 2000)
    meter.note(512, contexts_of(0, 512), 60.0)
    assert meter.cost.seconds(0, 2000) < 1.5 * before


def test_an_engine_that_becomes_slower_is_followed():
    meter = PrefillMeter(512)
    prompts_through(meter, TRUE, 10)
    slow = PrefillCost(0.016, 8e-4, 12e-8, 512)
    prompts_through(meter, slow, 20)
    assert meter.cost.seconds(0, 2000) == pytest.approx(slow.seconds(0, 2000), rel=0.1)


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_steps_that_took_no_time_are_not_believed(seconds):
    meter = PrefillMeter(512)
    meter.note(1000, 0.0, seconds)
    assert meter.cost is None


@pytest.mark.parametrize("token_s", [math.nan, math.inf, 0.0])
def test_a_cost_from_outside_that_makes_no_sense_is_unsound(token_s):
    assert not PrefillCost(0.0, token_s, 0.0, 512).is_sound
    assert TRUE.is_sound
