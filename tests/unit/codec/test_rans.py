"""The rANS coder: its vector loop is its plain loop, only faster."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mcp_vllm.codec import rans

needs_vectors = pytest.mark.skipif(not rans._HAS_VECTORS, reason="this CPU lacks AVX512-VBMI2")
sizes = st.one_of(st.integers(1, 400), st.sampled_from([64 * 40, 64 * 40 + 1, 5000]))
lanes = st.sampled_from([rans.FEW_LANES, rans.MANY_LANES])


def coded(size: int, seed: int, num_lanes: int) -> tuple[np.ndarray, ...]:
    """Symbols and classes [size], table, and the words of the stream."""
    random = np.random.default_rng(seed)
    classes = random.integers(0, 3, size).astype(np.uint8)
    symbols = np.clip(random.normal(100 + 20 * classes, 1 + 9 * classes), 0, 255).astype(np.uint8)
    counts = np.zeros((3, 256), np.uint32)
    np.add.at(counts, (classes, symbols), 1)
    counts[:, 7] += 1  # No class without a table.
    frequencies = np.empty((3, 256), np.uint16)
    rans.normalize(counts, frequencies)
    table = np.empty(3 * rans.TABLE_SIZE, np.uint32)
    assert rans.build_decoding_table(frequencies, 0, table)
    words = np.empty(rans.most_words(size), np.uint16)
    start = rans.encode(symbols, classes, frequencies, num_lanes, words)
    return symbols, classes, table, words[start:].copy()


def decoded(size, classes, table, words, num_lanes, *, has_vectors) -> tuple[bool, np.ndarray]:
    decoder = rans.Decoder(words, classes, table, num_lanes)
    decoder.has_vectors = has_vectors and decoder.has_vectors
    out = np.zeros(size, np.uint8)
    return decoder.rest(out), out


@given(size=sizes, seed=st.integers(0, 9), num_lanes=lanes)
def test_a_stream_gives_back_its_symbols_with_and_without_vectors(size, seed, num_lanes):
    symbols, classes, table, words = coded(size, seed, num_lanes)
    for has_vectors in (False, True):
        intact, out = decoded(size, classes, table, words, num_lanes, has_vectors=has_vectors)
        assert intact
        assert (out == symbols).all()


@needs_vectors
@given(size=sizes, seed=st.integers(0, 9), cut=st.integers(0, 300), flips=st.integers(0, 5))
def test_a_damaged_stream_decodes_alike_with_and_without_vectors(size, seed, cut, flips):
    _, classes, table, words = coded(size, seed, rans.MANY_LANES)
    random = np.random.default_rng(seed)
    for _ in range(flips):
        words[random.integers(words.size)] ^= np.uint16(1 << random.integers(16))
    words = words[: max(words.size - cut, 2 * rans.MANY_LANES)].copy()
    plain = decoded(size, classes, table, words, rans.MANY_LANES, has_vectors=False)
    vectors = decoded(size, classes, table, words, rans.MANY_LANES, has_vectors=True)
    assert plain[0] == vectors[0]
    assert (plain[1] == vectors[1]).all()


@given(size=st.integers(1, 300), num_words=st.integers(0, 127), num_lanes=lanes)
@example(size=1, num_words=0, num_lanes=rans.FEW_LANES)
def test_a_stream_without_room_for_its_states_is_refused_unread(size, num_words, num_lanes):
    _, classes, table, words = coded(size, 0, num_lanes)
    short = words[: min(num_words, 2 * num_lanes - 1)]
    intact, out = decoded(size, classes, table, short, num_lanes, has_vectors=True)
    assert not intact
    assert not out.any()


@needs_vectors
@given(size=sizes, seed=st.integers(0, 9))
def test_elements_are_symbols_with_their_residuals_turned_right_by_a_bit(size, seed):
    symbols, classes, table, words = coded(size, seed, rans.MANY_LANES)
    residuals = np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)
    elements = np.zeros(size, np.uint16)
    decoder = rans.Decoder(words, classes, table, rans.MANY_LANES)
    decoder.whole_elements(residuals, elements)
    rotated = symbols.astype(np.uint32) << 8 | residuals
    whole = decoder.num_decoded
    assert whole > 4000 or size < 5000
    assert (elements[:whole] == (rotated >> 1 | rotated << 15).astype(np.uint16)[:whole]).all()
