"""Few rows times a matrix, float32: a library's product packs the matrix first, which takes longer
than 16 rows do. One thread, without the GIL.
"""

from __future__ import annotations

import numpy as np

from mcp_vllm.codec.kernel import Float32s, kernel

_ROWS = 4
_TERMS = 4
_ZERO = np.float32(0)


@kernel(
    "(Array(float32, 2, 'C', readonly=True), Array(float32, 2, 'C', readonly=True),"
    " float32[:,::1])",
    fuse=True,
)
def _add_products(rows: Float32s, matrix: Float32s, out: Float32s) -> None:
    """out += rows @ matrix, of whose columns ``out`` has only the first; whole groups of _ROWS rows
    and _TERMS terms.
    """
    num_columns = out.shape[1]
    for term in range(0, rows.shape[1] - (_TERMS - 1), _TERMS):
        a = matrix[term][:num_columns]
        b = matrix[term + 1][:num_columns]
        c = matrix[term + 2][:num_columns]
        d = matrix[term + 3][:num_columns]
        for row in range(0, rows.shape[0], _ROWS):
            row0, row1, row2, row3 = rows[row], rows[row + 1], rows[row + 2], rows[row + 3]
            a0, b0, c0, d0 = row0[term], row0[term + 1], row0[term + 2], row0[term + 3]
            a1, b1, c1, d1 = row1[term], row1[term + 1], row1[term + 2], row1[term + 3]
            a2, b2, c2, d2 = row2[term], row2[term + 1], row2[term + 2], row2[term + 3]
            a3, b3, c3, d3 = row3[term], row3[term + 1], row3[term + 2], row3[term + 3]
            # Of coefficients that were rounded, most are zero.
            largest = max(
                abs(a0),
                abs(b0),
                abs(c0),
                abs(d0),
                abs(a1),
                abs(b1),
                abs(c1),
                abs(d1),
                abs(a2),
                abs(b2),
                abs(c2),
                abs(d2),
                abs(a3),
                abs(b3),
                abs(c3),
                abs(d3),
            )
            if largest == 0:
                continue
            sum0, sum1, sum2, sum3 = out[row], out[row + 1], out[row + 2], out[row + 3]
            # Sixteen products for four loads and stores of sums.
            for column in range(num_columns):
                va, vb, vc, vd = a[column], b[column], c[column], d[column]
                sum0[column] += a0 * va + b0 * vb + c0 * vc + d0 * vd
                sum1[column] += a1 * va + b1 * vb + c1 * vc + d1 * vd
                sum2[column] += a2 * va + b2 * vb + c2 * vc + d2 * vd
                sum3[column] += a3 * va + b3 * vb + c3 * vc + d3 * vd


def product(
    rows: Float32s, matrix: Float32s, num_columns: int, offsets: Float32s | None = None
) -> Float32s:
    """(rows - offsets) @ matrix[:, :num_columns] of [row, term], [term, column] and [term]."""
    num_rows, num_terms = rows.shape
    whole_rows = -(-num_rows // _ROWS) * _ROWS
    factors = np.zeros((whole_rows, num_terms), np.float32)
    np.subtract(rows, _ZERO if offsets is None else offsets, out=factors[:num_rows])
    out = np.zeros((whole_rows, num_columns), np.float32)
    _add_products(factors, matrix, out)
    if rest := num_terms % _TERMS:
        out += factors[:, -rest:] @ matrix[-rest:, :num_columns]
    return out[:num_rows]
