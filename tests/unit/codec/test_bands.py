"""Values laid out for the products of the bands, and back."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lossy_kv import ARRANGEMENTS, calibration, rows

from mcp_vllm.codec import bands, rotation
from mcp_vllm.codec.calibration import MAX_LEVEL
from mcp_vllm.codec.multiply import ROWS, whole_rows
from mcp_vllm.codec.transform_plan import TransformPlan, plan_of

KV = ARRANGEMENTS["token, head, K then V"]
FIRST_TOKEN = 1000
# The second band's, which has none, or others than the first.
frequencies = st.sampled_from([(), (0.5,), (0.5, 0.25, 0.125, 0.1)])
num_tokens = st.integers(1, 2 * ROWS + 1)


def plan_with(frequencies: tuple[float, ...]) -> TransformPlan:
    first, second = calibration().bands
    second = dataclasses.replace(second, frequencies=np.array(frequencies, np.float32))
    return plan_of(dataclasses.replace(calibration(), bands=(first, second)), KV, 0.5)


def taken_out(values: np.ndarray, plan: TransformPlan) -> np.ndarray:
    blocks = plan.channels.empty(len(values))
    angles = plan.angles(FIRST_TOKEN, len(values))
    places = plan.channels.places
    bands.take_out(values, plan.spans, plan.means, *angles, places, whole_rows(len(values)), blocks)
    return blocks


@given(num_tokens=num_tokens, seed=st.integers(0, 3), frequencies=frequencies)
def test_blocks_hold_each_bands_channels_turned_back_and_without_their_means(
    num_tokens, seed, frequencies
):
    values = rows(num_tokens, seed)
    plan = plan_with(frequencies)
    blocks = plan.channels.each(taken_out(values, plan), whole_rows(num_tokens))
    for band, block in zip(plan.bands, blocks, strict=True):
        expected = np.concatenate([values[:, KV.columns[s]] for s in band.sources], axis=1)
        width = len(band.mean) // len(band.sources)
        cosines, sines = rotation.angles(band.frequencies, FIRST_TOKEN, num_tokens)
        for number, source in enumerate(band.sources):
            if source.kind == "k":
                head = expected[:, number * width : (number + 1) * width]
                rotation.rotate(head, cosines, -sines)
        np.testing.assert_allclose(block[:num_tokens], expected - band.mean, atol=1e-5)
        assert not block[num_tokens:].any()


@given(num_tokens=num_tokens, seed=st.integers(0, 3), frequencies=frequencies)
def test_what_is_put_back_is_what_was_taken_out(num_tokens, seed, frequencies):
    values = rows(num_tokens, seed)
    plan = plan_with(frequencies)
    blocks = taken_out(values, plan)
    restored = np.full_like(values, np.nan)
    angles = plan.angles(FIRST_TOKEN, num_tokens)
    places = plan.channels.places
    bands.put_back(
        blocks, plan.spans, plan.means, *angles, places, whole_rows(num_tokens), restored
    )
    np.testing.assert_allclose(restored, values, atol=1e-5)


@pytest.mark.parametrize(
    ("level", "expected"),
    [(0.4, 0), (-0.6, -1), (2.6, 3), (99.0, MAX_LEVEL), (-np.inf, -MAX_LEVEL), (np.nan, 0)],
)
def test_a_level_is_rounded_and_bounded_and_makes_the_step_coarser(level, expected):
    blocks = np.zeros((ROWS, 4), np.float32)
    blocks[0] = [level - 0.25, 8.0, -2.0, 4.0]
    levels, shifts = np.empty((2, 1, 1), np.int8)
    coefficients = np.empty((1, 3), np.float32)
    finer = np.arange(1, 2 * MAX_LEVEL + 2, dtype=np.float32)
    bands.weigh(
        blocks.reshape(-1), np.array([[0, 4]]), ROWS, np.array([[0, 3]]),
        np.array([0.25], np.float32), finer, np.ones(3, np.float32), 1.0,
        levels, shifts, coefficients,
    )  # fmt: skip
    assert levels == expected
    factor = finer[expected + MAX_LEVEL]
    np.testing.assert_array_equal(coefficients, factor * blocks[:1, 1:])
    # Half octaves by which the mean of magnitudes is above one.
    assert shifts == min(round(2 * np.log2(14 / 3 * factor)), bands.MAX_SHIFT)
