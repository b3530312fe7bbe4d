"""What is remembered of the loads from one source."""

import pytest

from mcp_vllm.agent.load_record import MAX_FACTOR, LoadRecord


def test_what_the_model_leaves_out_is_learned_as_a_factor():
    record = LoadRecord()
    for _ in range(20):
        record.ran(predicted_s=record.factor * 0.1, modelled_s=0.1, actual_s=0.15)
    assert record.factor == pytest.approx(1.5, rel=0.01)
    assert record.accuracy == pytest.approx(1.0, abs=0.05)


def test_one_strange_load_moves_it_a_little():
    record = LoadRecord()
    for _ in range(5):
        record.ran(predicted_s=0.1, modelled_s=0.1, actual_s=0.1)
    record.ran(predicted_s=0.1, modelled_s=0.1, actual_s=100.0)
    assert record.factor < MAX_FACTOR**0.31


def test_it_says_nothing_before_the_first_load():
    record = LoadRecord()
    assert record.accuracy is None
    record.chose("recompute")
    assert record.returning
    record.chose("partial")
    assert not record.returning
    assert dict(record.choices) == {"recompute": 1, "partial": 1}
