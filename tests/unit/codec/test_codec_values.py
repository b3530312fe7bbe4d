"""Every element type with the values and shapes that break float codecs, bit for bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_chunks import bf16_kv

from mcp_vllm.codec import (
    ChunkLayout,
    CodecError,
    decode_frame_into,
    encode_frame,
    get_codec,
    lossless_names,
)
from mcp_vllm.codec.layout import ELEMENT_SIZE_BYTES, ELEMENTS, Element

LOSSLESS = lossless_names()
# Sign, exponent and mantissa bits.
FIELDS: dict[Element, tuple[int, int]] = {"bf16": (8, 7), "f16": (5, 10), "f32": (8, 23)}


def special_patterns(element: Element) -> list[int]:
    """Bit patterns: zeros, subnormals, one, the largest, infinities, NaNs with payloads."""
    exponent_bits, mantissa_bits = FIELDS[element]
    sign, infinity = 1 << exponent_bits + mantissa_bits, (1 << exponent_bits) - 1 << mantissa_bits
    one = (1 << exponent_bits - 1) - 1 << mantissa_bits
    positive = [0, 1, (1 << mantissa_bits) - 1, one, infinity - 1, infinity, infinity + 1, sign - 1]
    return [*positive, *(sign | pattern for pattern in positive)]


@st.composite
def special_chunks(draw: st.DrawFn) -> tuple[bytes, ChunkLayout]:
    """Runs and mixtures of special values of a float type, with a few bytes too many."""
    element = draw(st.sampled_from(list(FIELDS)))
    pool = draw(st.lists(st.sampled_from(special_patterns(element)), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    width = f"u{ELEMENT_SIZE_BYTES[element]}"
    values = rng.choice(np.array(pool, width), draw(st.integers(0, 4000)))
    channels = draw(st.sampled_from([1, 7, 64, 256]))
    return values.tobytes() + bytes(draw(st.integers(0, 3))), ChunkLayout(element, channels)


def round_trip(raw, layout: ChunkLayout, codec_name: str) -> bytes:
    out = bytearray(memoryview(raw).nbytes)
    frame = encode_frame(b"key", raw, layout, get_codec(codec_name))
    decode_frame_into(frame, memoryview(out), key=b"key")
    return bytes(out)


@pytest.mark.parametrize("codec_name", LOSSLESS)
@given(chunk=special_chunks())
def test_special_values_of_every_float_survive(codec_name, chunk):
    raw, layout = chunk
    assert round_trip(raw, layout, codec_name) == raw


@pytest.mark.parametrize("codec_name", LOSSLESS)
@pytest.mark.parametrize("element", ELEMENTS)
def test_every_bit_pattern_of_sixteen_bits_survives_as_any_element(codec_name, element):
    raw = np.random.default_rng(0).permutation(1 << 16).astype(np.uint16).tobytes()
    assert round_trip(raw, ChunkLayout(element, 64), codec_name) == raw


@pytest.mark.parametrize("codec_name", LOSSLESS)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    seed=st.integers(0, 9),
    is_transposed=st.booleans(),
    step=st.integers(1, 2),
)
def test_arrays_of_any_shape_survive_or_are_refused_as_not_contiguous(
    codec_name, shape, seed, is_transposed, step
):
    array = np.random.default_rng(seed).integers(0, 1 << 16, shape, np.uint16)
    if is_transposed:
        array = array.T
    if array.ndim:
        array = array[::step]
    layout = ChunkLayout("bf16", max(1, array.shape[-1]) if array.ndim else 1)
    if array.flags.c_contiguous:
        assert round_trip(array, layout, codec_name) == array.tobytes()
    else:
        with pytest.raises(CodecError, match="contiguous"):
            round_trip(array, layout, codec_name)


@pytest.mark.parametrize("codec_name", LOSSLESS)
@pytest.mark.parametrize("element", ["f16", "f32", "f8", "u8"])
def test_flipped_bits_are_detected_or_harmless_for_every_element(codec_name, element):
    raw, layout = bf16_kv(150, 16), ChunkLayout(element, 16)
    frame = encode_frame(b"key", raw, layout, get_codec(codec_name))
    # One bit of every third byte: every bit of bf16 frames is flipped in test_codec_damage.py.
    for index in range(0, len(frame), 3):
        damaged = bytearray(frame)
        damaged[index] ^= 1 << index % 8
        out = bytearray(len(raw))
        try:
            decode_frame_into(damaged, memoryview(out), key=b"key")
        except CodecError:
            continue
        assert bytes(out) == raw
