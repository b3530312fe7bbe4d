"""The noise's account is what the formulas of zCDP say, and the samples are what it counts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcp_vllm.split.activations import Activations
from mcp_vllm.split.noise import ActivationNoise, NoisySessions, noisy_batch


@given(st.floats(1e-3, 1e5), st.floats(1e-12, 0.5), st.floats(1e-3, 1e4))
def test_one_row_spends_what_was_asked_for(row_epsilon, delta, clip_norm):
    noise = ActivationNoise(clip_norm, row_epsilon, delta)
    assert noise.epsilon(1) == pytest.approx(row_epsilon, rel=1e-6)
    assert (2 * clip_norm) ** 2 / (2 * noise.sigma**2) == pytest.approx(noise.row_rho, rel=1e-9)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_rows_add_up_in_zcdp_and_not_in_epsilon(some, others):
    noise = ActivationNoise(1.0, 2.0)
    assert noise.epsilon(some) < noise.epsilon(some + others)
    assert noise.epsilon(some + others) < noise.epsilon(some) + noise.epsilon(others)
    rho = (some + others) * noise.row_rho
    expected = rho + 2 * math.sqrt(rho * math.log(1e5))
    assert noise.epsilon(some + others) == pytest.approx(expected)


def test_noise_has_the_standard_deviation_that_is_accounted_for():
    noise = ActivationNoise(clip_norm=3.0, row_epsilon=5.0)
    rows = noise.apply(torch.zeros(500, 400))
    assert float(rows.std()) == pytest.approx(noise.sigma, rel=0.01)
    assert abs(float(rows.mean())) < 0.01 * noise.sigma
    # Of a normal distribution, 4.55 % lie beyond two standard deviations.
    assert float((rows.abs() > 2 * noise.sigma).float().mean()) == pytest.approx(0.0455, rel=0.05)
    assert not torch.equal(rows, noise.apply(torch.zeros(500, 400)))


def test_rows_are_clipped_to_the_norm_and_short_ones_left_alone():
    noise = ActivationNoise(clip_norm=3.0, row_epsilon=1e12)
    rows = torch.tensor([[30.0, 40.0], [0.3, 0.4], [0.0, 0.0]])
    noisy = noise.apply(rows)
    expected = torch.tensor([[1.8, 2.4], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(noisy, expected, atol=1e-3)


@pytest.mark.parametrize("wrong", [{"clip_norm": 0.0}, {"row_epsilon": math.nan}, {"delta": 1.0}])
def test_settings_that_protect_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ActivationNoise(**{"clip_norm": 1.0, "row_epsilon": 1.0, **wrong})


def test_a_batch_is_sent_as_noisy_sums_and_each_request_pays_for_its_rows():
    sessions = NoisySessions(ActivationNoise(clip_norm=100.0, row_epsilon=1e12))
    hidden = torch.arange(12.0).reshape(4, 3).bfloat16()
    residual = torch.ones(4, 3).bfloat16()
    sent = noisy_batch(sessions, Activations(hidden, residual), {"a": 1, "b": 3})
    assert sent.residual is not None
    assert not sent.residual.any()
    assert sent.hidden.dtype == torch.bfloat16
    torch.testing.assert_close(sent.hidden, hidden + 1, atol=0.1, rtol=0)
    noise = ActivationNoise(clip_norm=100.0, row_epsilon=1e12)
    assert [sessions.epsilon(each) for each in "ab"] == [noise.epsilon(1), noise.epsilon(3)]


def test_a_batch_without_a_residual_is_sent_without_one_and_noisy():
    sessions = NoisySessions(ActivationNoise(clip_norm=1.0, row_epsilon=1.0))
    sent = noisy_batch(sessions, Activations(torch.zeros(2, 500), None), {"a": 2})
    assert sent.residual is None
    assert float(sent.hidden.std()) == pytest.approx(ActivationNoise(1.0, 1.0).sigma, rel=0.1)
