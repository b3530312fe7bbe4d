"""Our product of few rows is the product."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_vllm.codec.kernel import kernel
from mcp_vllm.codec.multiply import PANEL_COLUMNS, ROWS, Panels, whole_columns, whole_rows


@given(
    num_rows=st.integers(1, 2 * ROWS + 1),
    num_terms=st.integers(0, 21),
    more_terms=st.integers(0, 3),
    num_columns=st.integers(1, 3 * PANEL_COLUMNS),
    more_columns=st.integers(0, PANEL_COLUMNS + 1),
    seed=st.integers(0, 3),
)
def test_a_product_is_what_numpy_says(
    num_rows, num_terms, more_terms, num_columns, more_columns, seed
):
    random = np.random.default_rng(seed)
    shape = (num_terms + more_terms, num_columns + more_columns)
    matrix = random.normal(size=shape).astype(np.float32)
    factors = random.normal(size=(whole_rows(num_rows), num_terms)).astype(np.float32)
    out = np.full((len(factors), whole_columns(num_columns)), np.nan, np.float32)
    Panels(matrix).multiply(factors, out)
    expected = factors @ matrix[:num_terms]
    np.testing.assert_allclose(out[:, :num_columns], expected[:, :num_columns], 1e-5, 1e-4)
    assert np.isfinite(out).all()


def test_results_are_chains_of_fused_multiply_adds_in_the_order_of_the_terms():
    """So that every machine restores the same bytes."""
    random = np.random.default_rng(0)
    factors = random.normal(size=(ROWS, 40)).astype(np.float32)
    matrix = random.normal(size=(40, PANEL_COLUMNS)).astype(np.float32)
    expected = np.zeros((ROWS, PANEL_COLUMNS), np.float32)
    for term in range(40):
        # Exact in float64 but for the sum's last bits, which float32 has no room for.
        products = factors[:, term, None].astype(np.float64) * matrix[term]
        expected = (products + expected).astype(np.float32)
    out = np.empty_like(expected)
    Panels(matrix).multiply(factors, out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("factors", "out"),
    [
        ((ROWS - 1, 4), (ROWS - 1, PANEL_COLUMNS)),
        ((ROWS, 4), (2 * ROWS, PANEL_COLUMNS)),
        ((ROWS, 5), (ROWS, PANEL_COLUMNS)),
        ((ROWS, 4), (ROWS, PANEL_COLUMNS - 1)),
        ((ROWS, 4), (ROWS, 2 * PANEL_COLUMNS)),
    ],
)
def test_shapes_that_do_not_fit_are_an_error_not_memory_that_is_not_ours(factors, out):
    panels = Panels(np.ones((4, 7), np.float32))
    with pytest.raises(ValueError, match="no product"):
        panels.multiply(np.ones(factors, np.float32), np.ones(out, np.float32))


def test_a_kernel_for_other_machines_is_left_alone_on_this_one():
    def loop(values):
        return values

    assert kernel()(loop) is loop
