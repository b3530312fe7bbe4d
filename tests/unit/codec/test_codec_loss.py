"""Losses add up to the worst, and only those who accept a tier are given what went through it."""

from hypothesis import given
from hypothesis import strategies as st

from mcp_vllm.codec.loss import EXACT, LOSSY_TIERS, is_acceptable, rank, worst
from mcp_vllm.config import schema

losses = st.sampled_from((EXACT, *LOSSY_TIERS))


@given(st.lists(losses))
def test_the_worst_is_one_of_them_and_none_is_worse(parts):
    result = worst(parts)
    assert result in (*parts, EXACT)
    assert all(rank(each) <= rank(result) for each in parts)


@given(losses, st.sets(st.sampled_from(LOSSY_TIERS)))
def test_exact_is_for_everybody_and_the_rest_for_those_who_name_it(loss, accepted):
    assert is_acceptable(loss, accepted) == (loss == EXACT or loss in accepted)


def test_an_unknown_loss_is_the_worst_and_acceptable_to_nobody():
    assert worst(["small", "from-the-future"]) == "from-the-future"
    assert not is_acceptable("from-the-future", LOSSY_TIERS)


def test_the_configuration_knows_the_same_tiers():
    assert schema.LOSSY_TIERS == LOSSY_TIERS
