"""The middle of a rANS stream of 64 lanes, decoded in vectors of 16 states: AVX-512 machines.

LLVM's own loop vectoriser can't: which lanes take a word, and so where the next one's word lies, is
known only after the one before. The instruction that spreads consecutive words over the lanes of a
mask (vpexpandw of AVX512-VBMI2) does it for 16 lanes at once; numba offers no way to ask for it but
a function of LLVM's IR. rans.py owns the format, and its loop does what is left over, or all of it
on machines without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import llvmlite.binding
import numba
from llvmlite import ir
from llvmlite.ir.instructions import GEPInstr
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mcp_vllm.codec.kernel import UInt8s, UInt16s, UInt32s, kernel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WIDTH = 16
NUM_VECTORS = 4
NUM_LANES = WIDTH * NUM_VECTORS

_BYTE, _WORD, _STATE, _SIZE, _FLAG = (ir.IntType(bits) for bits in (8, 16, 32, 64, 1))


def is_supported() -> bool:
    """Whether this CPU has the instructions; without, LLVM would make branches of them."""
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("avx512vbmi2")) and not numba.config.DISABLE_JIT


def _on_such_machines(signature: str) -> list[str]:
    """What to compile a kernel for; elsewhere nothing, and it must not be called."""
    return [signature] if is_supported() else []


def _vector(element: ir.Type) -> ir.Type:
    return ir.VectorType(element, WIDTH)


def _all(element: ir.Type, value: int) -> ir.Constant:
    return ir.Constant(_vector(element), [value] * WIDTH)


class _Emitter:
    """Writes vector instructions at a builder's place."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        pointers = ir.VectorType(ir.PointerType(_STATE), WIDTH)
        flags = _vector(_FLAG)

        def declared(name: str, result: ir.Type, *arguments: ir.Type) -> Any:
            function_type = ir.FunctionType(result, arguments)
            return cgutils.get_or_insert_function(builder.module, function_type, name)

        states, words = _vector(_STATE), _vector(_WORD)
        self._pointers = pointers
        self._gather = declared(
            "llvm.masked.gather.v16i32.v16p0", states, pointers, _STATE, flags, states
        )
        self._expand = declared(
            "llvm.masked.expandload.v16i16", words, ir.PointerType(_WORD), flags, words
        )
        self._count = declared("llvm.ctpop.i16", _WORD, _WORD)

    def _at(self, array: Any, index: Any, element: ir.Type) -> Any:
        address = self._builder.gep(array.data, [index])
        return self._builder.bitcast(address, ir.PointerType(_vector(element)))

    def load(self, array: Any, index: Any, element: ir.Type) -> Any:
        return self._builder.load(self._at(array, index, element), align=1)

    def store(self, values: Any, array: Any, index: Any, element: ir.Type) -> None:
        """The low bits of each of the values."""
        narrow = values if values.type == _vector(element) else self._narrow(values, element)
        self._builder.store(narrow, self._at(array, index, element), align=1)

    def _narrow(self, values: Any, element: ir.Type) -> Any:
        return self._builder.trunc(values, _vector(element))

    def widened_bytes(self, array: Any, index: Any) -> Any:
        """WIDTH bytes as states."""
        return self._builder.zext(self.load(array, index, _BYTE), _vector(_STATE))

    def gather(self, table: Any, indices: Any) -> Any:
        """table[indices]"""
        builder = self._builder
        address = GEPInstr(builder.block, table.data, [indices], False, "", source_etype=_STATE)
        address.type = self._pointers  # llvmlite knows addresses of scalars only.
        builder._insert(address)
        align = ir.Constant(_STATE, 4)
        return builder.call(self._gather, [address, align, _all(_FLAG, 1), _all(_STATE, 0)])

    def expand(self, words: Any, position: Any, flags: Any) -> tuple[Any, Any]:
        """As many words from ``position`` on as there are flags, each in its lane, as states; and
        the position after them.
        """
        builder = self._builder
        start = builder.gep(words.data, [position])
        spread = builder.call(self._expand, [start, flags, _all(_WORD, 0)])
        number = builder.call(self._count, [builder.bitcast(flags, _WORD)])
        past = builder.add(position, builder.zext(number, _SIZE))
        return builder.zext(spread, _vector(_STATE)), past


def _step(
    builder: Any, emitter: _Emitter, arrays: Any, index: Any, position: Any, states: list[Any]
) -> tuple[Any, list[Any]]:
    """rans.decode's two inner loops for NUM_LANES symbols: the new position and states."""
    words, classes, table, residuals, target = arrays
    decoded = []
    for number, state in enumerate(states):
        here = builder.add(index, ir.Constant(_SIZE, WIDTH * number))
        rows = emitter.widened_bytes(classes, here)
        slots = builder.and_(state, _all(_STATE, 2047))
        entry = emitter.gather(table, builder.or_(builder.shl(rows, _all(_STATE, 11)), slots))
        frequency = builder.and_(builder.lshr(entry, _all(_STATE, 8)), _all(_STATE, 2047))
        frequency = builder.add(frequency, _all(_STATE, 1))
        scaled = builder.mul(frequency, builder.lshr(state, _all(_STATE, 11)))
        decoded.append(builder.add(scaled, builder.lshr(entry, _all(_STATE, 20))))
        if residuals is None:
            emitter.store(entry, target, here, _BYTE)
        else:
            high = builder.shl(builder.and_(entry, _all(_STATE, 0xFF)), _all(_STATE, 8))
            rotated = builder.or_(high, emitter.widened_bytes(residuals, here))
            high = builder.shl(rotated, _all(_STATE, 15))
            value = builder.or_(builder.lshr(rotated, _all(_STATE, 1)), high)
            emitter.store(value, target, here, _WORD)
    refilled = []
    for state in decoded:
        is_low = builder.icmp_unsigned("<", state, _all(_STATE, 1 << 16))
        taken, position = emitter.expand(words, position, is_low)
        full = builder.or_(builder.shl(state, _all(_STATE, 16)), taken)
        refilled.append(builder.select(is_low, full, state))
    return position, refilled


def _loop(context: Any, builder: Any, types_and_values: Any) -> Any:
    """Emit the loop over groups; arguments as of decode_whole_groups, ``residuals`` or None."""
    words, classes, table, residuals, target, states, progress = (
        array_type and context.make_array(array_type)(context, builder, value)
        for array_type, value in types_and_values
    )
    emitter = _Emitter(builder)
    places = [ir.Constant(_SIZE, WIDTH * number) for number in range(NUM_VECTORS)]
    counters = [builder.gep(progress.data, [ir.Constant(_SIZE, n)]) for n in range(2)]
    carried = [builder.load(counter) for counter in counters]
    carried += [emitter.load(states, place, _STATE) for place in places]
    entry = builder.block
    head, body, past = (builder.append_basic_block() for _ in range(3))
    builder.branch(head)

    builder.position_at_end(head)
    phis = [builder.phi(value.type) for value in carried]
    index, position, *running = phis
    lanes = ir.Constant(_SIZE, NUM_LANES)
    # A group takes at most a word for each lane.
    has_words = builder.icmp_unsigned("<=", builder.add(position, lanes), words.nitems)
    has_symbols = builder.icmp_unsigned("<=", builder.add(index, lanes), target.nitems)
    builder.cbranch(builder.and_(has_words, has_symbols), body, past)

    builder.position_at_end(body)
    arrays = words, classes, table, residuals, target
    new_position, new_states = _step(builder, emitter, arrays, index, position, running)
    new_values = [builder.add(index, lanes), new_position, *new_states]
    builder.branch(head)
    for phi, before, after in zip(phis, carried, new_values, strict=True):
        phi.add_incoming(before, entry)
        phi.add_incoming(after, body)

    builder.position_at_end(past)
    for counter, value in zip(counters, phis[:2], strict=True):
        builder.store(value, counter)
    for place, value in zip(places, running, strict=True):
        emitter.store(value, states, place, _STATE)
    return context.get_dummy_value()


@intrinsic  # type: ignore[untyped-decorator]
def _symbols_loop(
    typing_context: Any,
    words: Any,
    classes: Any,
    table: Any,
    symbols: Any,
    states: Any,
    progress: Any,
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        given = list(zip(signature.args, arguments, strict=True))
        return _loop(context, builder, [*given[:3], (None, None), *given[3:]])

    return types.void(words, classes, table, symbols, states, progress), generate


@intrinsic  # type: ignore[untyped-decorator]
def _elements_loop(
    typing_context: Any,
    words: Any,
    classes: Any,
    table: Any,
    residuals: Any,
    elements: Any,
    states: Any,
    progress: Any,
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _loop(context, builder, zip(signature.args, arguments, strict=True))

    return types.void(words, classes, table, residuals, elements, states, progress), generate


@kernel(
    *_on_such_machines(
        "(Array(uint16, 1, 'C', readonly=True), Array(uint8, 1, 'C', readonly=True),"
        " Array(uint32, 1, 'C', readonly=True), uint8[::1], uint32[::1], uint64[::1])"
    )
)
def decode_whole_groups(
    words: UInt16s,
    classes: UInt8s,
    table: UInt32s,
    symbols: UInt8s,
    states: UInt32s,
    progress: NDArray[np.uint64],
) -> None:
    """Decode groups of NUM_LANES symbols while as many words are left.

    ``progress`` [2]: how many symbols were decoded and how many words read, before and after; so
    are ``states`` [NUM_LANES]. Nothing is read out of bounds, if each class has a table.
    """
    _symbols_loop(words, classes, table, symbols, states, progress)


@kernel(
    *_on_such_machines(
        "(Array(uint16, 1, 'C', readonly=True), Array(uint8, 1, 'C', readonly=True),"
        " Array(uint32, 1, 'C', readonly=True), Array(uint8, 1, 'C', readonly=True), uint16[::1],"
        " uint32[::1], uint64[::1])"
    )
)
def decode_elements(
    words: UInt16s,
    classes: UInt8s,
    table: UInt32s,
    residuals: UInt8s,
    elements: UInt16s,
    states: UInt32s,
    progress: NDArray[np.uint64],
) -> None:
    """decode_whole_groups that puts each symbol before its residual and turns both right by a bit:
    the 16-bit floats of lossless.py.
    """
    _elements_loop(words, classes, table, residuals, elements, states, progress)
