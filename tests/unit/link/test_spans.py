import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_vllm.link.spans import check_spans, gather, scatter

ROW_BYTES = 200


@st.composite
def span_lists(draw: st.DrawFn) -> list[tuple[int, int]]:
    edges = sorted(draw(st.lists(st.integers(0, ROW_BYTES), min_size=2, max_size=10, unique=True)))
    pairs = zip(edges[::2], edges[1::2], strict=False)
    return [(start, end - start) for start, end in pairs]


@given(span_lists(), st.integers(0, 99))
@settings(derandomize=True, deadline=None)
def test_scatter_puts_back_what_gather_took_and_nothing_else(spans, seed: int) -> None:
    check_spans(spans, ROW_BYTES)
    rng = np.random.default_rng(seed)
    source, target = (rng.integers(0, 256, ROW_BYTES, dtype=np.uint8) for _ in range(2))
    before = target.copy()
    packed = np.zeros(sum(length for _, length in spans), np.uint8)
    gather(source, spans, packed)
    scatter(packed, spans, target)
    inside = np.zeros(ROW_BYTES, bool)
    for offset, length in spans:
        inside[offset : offset + length] = True
    assert (target[inside] == source[inside]).all()
    assert (target[~inside] == before[~inside]).all()


@pytest.mark.parametrize(
    "spans",
    [
        [],
        [(0, 0)],
        [(0, -1)],
        [(-1, 5)],
        [(0, ROW_BYTES + 1)],
        [(ROW_BYTES, 1)],
        [(10, 5), (0, 5)],
        [(0, 6), (5, 5)],
        [(0, 2**62), (2**62, 1)],
    ],
)
def test_spans_that_overlap_or_leave_the_row_are_refused(spans) -> None:
    with pytest.raises(ValueError, match="span"):
        check_spans(spans, ROW_BYTES)
