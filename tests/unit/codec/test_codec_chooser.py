"""The choice of a codec for a link: right at the extremes, stable, quick to react."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_vllm.codec.chooser import CodecChooser, CodecCost, Link, break_evens

MB = 1e6
COSTS = {
    "raw": CodecCost(1.0, math.inf, 8000 * MB),
    "zstd": CodecCost(1.38, 400 * MB, 1300 * MB),
    "lossless": CodecCost(1.49, 300 * MB, 700 * MB),
}
SIZE, CHUNKS = 64 << 20, 170

rates = st.floats(1e4, 1e11)
costs = st.builds(CodecCost, st.floats(1, 50), rates, rates)
links = st.builds(Link, st.floats(1e3, 1e11), st.floats(0, 1))


def link_of(mb_s):
    return Link(mb_s * MB, 0.001)


def test_one_chunk_pays_every_stage_in_turn():
    cost = CodecCost(2.0, 100.0, 50.0)
    assert cost.seconds(1000, 1, Link(10.0, 0.5)) == pytest.approx(0.5 + 10 + 50 + 20)


def test_many_chunks_go_at_the_pace_of_the_slowest_stage():
    cost = CodecCost(2.0, 100.0, 50.0)
    seconds = cost.seconds(1_000_000, 100_000, Link(10.0, 0.0))
    assert seconds == pytest.approx(1_000_000 / 2 / 10, rel=1e-3)


@given(costs, links, st.integers(1, 1 << 40), st.integers(1, 1000))
def test_a_faster_link_is_never_slower(cost, link, size, num_chunks):
    faster = Link(2 * link.bytes_s, link.latency_s)
    slow_s = cost.seconds(size, num_chunks, link)
    assert cost.seconds(size, num_chunks, faster) <= slow_s
    assert slow_s >= link.latency_s + size / cost.ratio / link.bytes_s * (1 - 1e-9)


@pytest.mark.parametrize(("mb_s", "expected"), [(1, "lossless"), (100, "lossless"), (5000, "raw")])
def test_slow_links_get_the_best_ratio_and_fast_links_raw(mb_s, expected):
    assert CodecChooser().choose(COSTS, SIZE, CHUNKS, link_of(mb_s)) == expected


def test_what_the_sender_holds_already_costs_no_encoding():
    held = {**COSTS, "lossless": CodecCost(1.49, math.inf, 2500 * MB)}
    assert CodecChooser().choose(held, SIZE, CHUNKS, link_of(1200)) == "lossless"


@given(st.lists(st.floats(0.9, 1.1), min_size=1, max_size=50))
def test_a_link_that_wavers_about_a_break_even_does_not_flap(factors):
    (first, *_) = break_evens(COSTS, SIZE, CHUNKS, 0.001)
    chooser = CodecChooser()
    choices = {
        chooser.choose(COSTS, SIZE, CHUNKS, Link(first.bytes_s * factor, 0.001))
        for factor in factors
    }
    assert len(choices) == 1


def test_a_tenfold_change_is_followed_at_once():
    chooser = CodecChooser()
    assert chooser.choose(COSTS, SIZE, CHUNKS, link_of(3000)) == "raw"
    assert chooser.choose(COSTS, SIZE, CHUNKS, link_of(300)) == "zstd"
    assert chooser.choose(COSTS, SIZE, CHUNKS, link_of(3000)) == "raw"


def test_a_codec_that_is_allowed_no_more_is_left():
    chooser = CodecChooser()
    assert chooser.choose(COSTS, SIZE, CHUNKS, link_of(1)) == "lossless"
    without = {name: cost for name, cost in COSTS.items() if name != "lossless"}
    assert chooser.choose(without, SIZE, CHUNKS, link_of(1)) == "zstd"


@given(st.dictionaries(st.text(max_size=3), costs, min_size=1, max_size=5))
def test_break_evens_rise_and_separate_different_codecs(codecs):
    found = break_evens(codecs, SIZE, CHUNKS, 0.001)
    assert [point.bytes_s for point in found] == sorted(point.bytes_s for point in found)
    for point in found:
        assert point.below != point.above
        slower, faster = Link(point.bytes_s * 0.99, 0.001), Link(point.bytes_s * 1.01, 0.001)
        below, above = codecs[point.below], codecs[point.above]
        assert below.seconds(SIZE, CHUNKS, slower) <= above.seconds(SIZE, CHUNKS, slower) * 1.001
        assert above.seconds(SIZE, CHUNKS, faster) <= below.seconds(SIZE, CHUNKS, faster) * 1.001
