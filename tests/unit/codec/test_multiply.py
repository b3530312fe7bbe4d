"""Our product of few rows is the product."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mcp_vllm.codec.multiply import product


@given(
    num_rows=st.integers(1, 19),
    num_terms=st.integers(1, 21),
    num_columns=st.integers(1, 40),
    has_offsets=st.booleans(),
    seed=st.integers(0, 3),
)
def test_a_product_is_what_numpy_says(num_rows, num_terms, num_columns, has_offsets, seed):
    random = np.random.default_rng(seed)
    rows = random.normal(size=(num_rows, num_terms + 3)).astype(np.float32)[:, 1:-2]
    matrix = random.normal(size=(num_terms, num_columns + seed)).astype(np.float32)
    offsets = random.normal(size=num_terms).astype(np.float32) if has_offsets else None
    expected = (rows - (offsets if has_offsets else 0)) @ matrix[:, :num_columns]
    ours = product(rows, matrix, num_columns, offsets)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)
