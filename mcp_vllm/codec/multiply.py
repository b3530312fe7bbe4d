"""Few rows times a matrix, float32: one thread, without the GIL.

A library's product packs the matrix first, which takes longer than 16 rows do. Here it is packed
once (`Panels`), and a tile of the result stays in registers until all terms are added to it, which
numba offers no way to ask for but a function of LLVM's IR. Each result is one chain of fused
multiply-adds in the order of the terms, so it is the same on every CPU that has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mcp_vllm.codec.kernel import Float32s, kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

_FLOAT, _SIZE, _INT, _BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)


class _Tile(NamedTuple):
    """What of a result is summed at once: ``rows`` times ``vectors`` of ``lanes`` columns."""

    rows: int
    vectors: int
    lanes: int


def _tile() -> _Tile:
    """As many sums as the CPU has vector registers for, beside the factors."""
    if llvmlite.binding.get_host_cpu_features().get("avx512f"):
        return _Tile(8, 3, 16)
    return _Tile(4, 3, 8)


_TILE = _tile()
_VECTOR = ir.VectorType(_FLOAT, _TILE.lanes)
ROWS = _TILE.rows
PANEL_COLUMNS = _TILE.vectors * _TILE.lanes
# How many terms ahead of its use the matrix is fetched: it comes from a cache that cores share.
_TERMS_AHEAD = 8
_LINE_FLOATS = 16


def _size(value: int) -> ir.Constant:
    return ir.Constant(_SIZE, value)


class _Emitter:
    """Writes the instructions of a tile at a builder's place.

    Attributes: addresses of the tile's first element, and how far its rows are apart.
        factors: [row, term], ``num_terms`` apart.
        panel: [term, PANEL_COLUMNS]
        out: [row, column], ``out_stride`` apart.
    """

    def __init__(self, builder: Any, factors: Any, num_terms: Any, panel: Any, out: Any) -> None:
        self._builder = builder
        self._factors, self.num_terms = factors, num_terms
        self._panel, self._out = panel, out
        declared = cgutils.get_or_insert_function
        self._add_product = declared(
            builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{_TILE.lanes}f32"
        )
        prefetch = ir.FunctionType(ir.VoidType(), [ir.PointerType(_BYTE), _INT, _INT, _INT])
        self._prefetch = declared(builder.module, prefetch, "llvm.prefetch.p0")

    def _vector_at(self, address: Any, index: Any) -> Any:
        place = self._builder.gep(address, [index])
        return self._builder.bitcast(place, ir.PointerType(_VECTOR))

    def _terms(self, term: Any) -> list[Any]:
        """The panel's row of that term; one further on is asked for."""
        builder = self._builder
        row = builder.gep(self._panel, [builder.mul(term, _size(PANEL_COLUMNS))])
        for column in range(0, PANEL_COLUMNS, _LINE_FLOATS):
            later = builder.gep(row, [_size(_TERMS_AHEAD * PANEL_COLUMNS + column)])
            address = builder.bitcast(later, ir.PointerType(_BYTE))
            # To be read, and often.
            builder.call(self._prefetch, [address, *(ir.Constant(_INT, n) for n in (0, 3, 1))])
        starts = (_size(_TILE.lanes * number) for number in range(_TILE.vectors))
        return [builder.load(self._vector_at(row, start), align=4) for start in starts]

    def _factor(self, row: int, term: Any) -> Any:
        """One factor in all lanes."""
        builder = self._builder
        before = builder.mul(self.num_terms, _size(row))
        factor = builder.load(builder.gep(self._factors, [builder.add(before, term)]))
        nothing = ir.Constant(_VECTOR, ir.Undefined)
        first = builder.insert_element(nothing, factor, ir.Constant(_INT, 0))
        lanes = ir.Constant(ir.VectorType(_INT, _TILE.lanes), [0] * _TILE.lanes)
        return builder.shuffle_vector(first, nothing, lanes)

    def add(self, term: Any, sums: list[list[Any]]) -> list[list[Any]]:
        """sums [row, vector] and the products of one term."""
        terms = self._terms(term)
        added = []
        for row, of_row in enumerate(sums):
            factor = self._factor(row, term)
            pairs = zip(terms, of_row, strict=True)
            added.append([self._builder.call(self._add_product, [factor, t, s]) for t, s in pairs])
        return added

    def store(self, sums: list[list[Any]], out_stride: Any) -> None:
        builder = self._builder
        for row, of_row in enumerate(sums):
            before = builder.mul(out_stride, _size(row))
            for number, each in enumerate(of_row):
                place = builder.add(before, _size(_TILE.lanes * number))
                builder.store(each, self._vector_at(self._out, place), align=4)


def _loop(builder: Any, emitter: _Emitter, out_stride: Any) -> None:
    """Emit the loop over terms, and what stores its sums."""
    entry = builder.block
    head, body, past = (builder.append_basic_block() for _ in range(3))
    builder.branch(head)

    builder.position_at_end(head)
    term = builder.phi(_SIZE)
    sums = [[builder.phi(_VECTOR) for _ in range(_TILE.vectors)] for _ in range(_TILE.rows)]
    builder.cbranch(builder.icmp_signed("<", term, emitter.num_terms), body, past)

    builder.position_at_end(body)
    added = emitter.add(term, sums)
    next_term = builder.add(term, _size(1))
    builder.branch(head)
    nothing = ir.Constant(_VECTOR, [0.0] * _TILE.lanes)
    for phi, before, after in [
        (term, _size(0), next_term),
        *((phi, nothing, after) for phi, after in _pairs(sums, added)),
    ]:
        phi.add_incoming(before, entry)
        phi.add_incoming(after, body)

    builder.position_at_end(past)
    emitter.store(sums, out_stride)


def _pairs(left: list[list[Any]], right: list[list[Any]]) -> Iterator[tuple[Any, Any]]:
    for of_left, of_right in zip(left, right, strict=True):
        yield from zip(of_left, of_right, strict=True)


@intrinsic  # type: ignore[untyped-decorator]
def _multiply_tile(
    typing_context: Any, factors: Any, num_terms: Any, panel: Any, out: Any, out_stride: Any
) -> Any:
    """A tile from the first elements of these on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def first_of(index: int) -> Any:
            array = context.make_array(signature.args[index])
            return array(context, builder, arguments[index]).data

        emitter = _Emitter(builder, first_of(0), arguments[1], first_of(2), first_of(3))
        _loop(builder, emitter, arguments[4])
        return context.get_dummy_value()

    return types.void(factors, num_terms, panel, out, out_stride), generate


@kernel("boolean(Array(float32, 2, 'C', readonly=True), Array(float32, 3, 'C', readonly=True),"
        " float32[:,::1])")  # fmt: skip
def _multiply(factors: Float32s, panels: Float32s, out: Float32s) -> bool:
    """out = factors @ the first terms and panels of a matrix; whole tiles only.

    False where the panels are for other tiles than this code, which came from another machine.
    """
    if panels.shape[2] != PANEL_COLUMNS:
        return False
    num_terms = factors.shape[1]
    for panel in range(out.shape[1] // PANEL_COLUMNS):
        for row in range(0, factors.shape[0] - (ROWS - 1), ROWS):
            _multiply_tile(
                factors[row:].reshape(-1),
                num_terms,
                panels[panel].reshape(-1),
                out[row:].reshape(-1)[panel * PANEL_COLUMNS :],
                out.shape[1],
            )
    return True


def whole_rows(num_rows: int) -> int:
    """How many rows a product of that many needs: whole tiles."""
    return -(-num_rows // ROWS) * ROWS


def whole_columns(num_columns: int) -> int:
    """How many columns a product of that many writes: whole panels."""
    return -(-num_columns // PANEL_COLUMNS) * PANEL_COLUMNS


class Panels:
    """A matrix [term, column] of float32, packed [panel, term, column of the panel]."""

    def __init__(self, matrix: Float32s) -> None:
        num_terms, num_columns = matrix.shape
        num_panels = whole_columns(num_columns) // PANEL_COLUMNS
        self._panels = np.zeros((num_panels, num_terms, PANEL_COLUMNS), np.float32)
        for number, panel in enumerate(self._panels):
            columns = matrix[:, number * PANEL_COLUMNS : (number + 1) * PANEL_COLUMNS]
            panel[:, : columns.shape[1]] = columns

    def multiply(self, factors: Float32s, out: Float32s) -> None:
        """out = factors @ matrix[:terms, :columns], of the first terms and columns as
        factors [row, term] and out [row, column] have.

        Raises ValueError unless rows are ``whole_rows``, columns ``whole_columns`` of some number,
        and not more than the matrix has.
        """
        num_panels, num_terms, _ = self._panels.shape
        fits = (
            len(factors) == len(out) == whole_rows(len(out))
            and factors.shape[1] <= num_terms
            and out.shape[1] == whole_columns(out.shape[1]) <= num_panels * PANEL_COLUMNS
        )
        if not fits:
            raise ValueError(f"no product of {factors.shape} with {out.shape} by these panels")
        if numba.config.DISABLE_JIT:
            panels = self._panels[: out.shape[1] // PANEL_COLUMNS, : factors.shape[1]]
            out[:] = factors @ panels.transpose(1, 0, 2).reshape(factors.shape[1], out.shape[1])
        elif not _multiply(factors, self._panels, out):
            raise ValueError("numba's cache holds code for another CPU: set NUMBA_CACHE_DIR")
