"""Which layers fit, and how a share shrinks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_vllm.split.errors import SplitError
from mcp_vllm.split.spans import fitting, smaller, text, within

SPANS = st.tuples(st.integers(1, 50), st.integers(1, 60)).map(lambda pair: (pair[0], sum(pair)))


def test_as_many_layers_as_fit_in_the_middle():
    assert fitting([10] * 10, 45) == (3, 7)
    assert fitting([10] * 10, 1000) == (1, 9)
    assert fitting([99, 10, 10, 10, 99], 25) in {(1, 3), (2, 4)}


def test_memory_for_no_layer_is_said_with_its_bytes():
    with pytest.raises(SplitError, match="3 bytes are left for weights, the smallest layer has 10"):
        fitting([10] * 4, 3)


@given(st.lists(st.integers(1, 100), min_size=3, max_size=30), st.integers(100, 3000))
def test_no_longer_span_would_fit(sizes, memory_bytes):
    first, end = fitting(sizes, memory_bytes)
    assert 0 < first < end < len(sizes)
    assert sum(sizes[first:end]) <= memory_bytes
    longer = end - first + 1
    for start in range(1, len(sizes) - longer):
        assert sum(sizes[start : start + longer]) > memory_bytes


@given(SPANS)
def test_a_share_shrinks_to_four_fifths_until_nothing_is_left(span):
    while (fewer := smaller(span)) is not None:
        assert within(fewer, span)
        length, less = span[1] - span[0], fewer[1] - fewer[0]
        assert less == min(int(0.8 * length), length - 1)
        span = fewer
    assert span[1] - span[0] == 1


def test_a_span_as_text():
    assert text((4, 14)) == "4:14"
