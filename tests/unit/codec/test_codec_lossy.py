"""Lossy tiers: what they promise of values, and what they refuse."""

import contextlib
import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lossy_kv import (
    ARRANGEMENTS,
    DIM,
    DTYPES,
    HEADS,
    LAYERS,
    TOKENS,
    calibration,
    chunk,
    layout,
    rows,
)

from mcp_vllm.codec import (
    ChunkLayout,
    CodecError,
    KVLayout,
    Plane,
    decode_frame_into,
    encode_frame,
    get_codec,
    integers,
    planes,
    read_header,
)
from mcp_vllm.codec import transform as codec_transform
from mcp_vllm.codec.byte_planes import compressor
from mcp_vllm.codec.calibration import MAX_LEVEL, Calibration
from mcp_vllm.codec.errors import FrameError
from mcp_vllm.codec.transform_plan import NARROWEST, ROUNDING, plan_of
from mcp_vllm.codec.values import from_float32, gather, scatter, to_float32

KEY = b"chunk"
LOSSY = ["near-lossless", "balanced", "small"]
STEP = 0.5
arrangements = st.sampled_from(list(ARRANGEMENTS.values()))
elements = st.sampled_from(list(DTYPES))


def codec_of(name: str):
    if name == "near-lossless":
        return get_codec(name)
    return get_codec(name, calibration=calibration(), step=STEP)


def decode(frame: bytes, kv: KVLayout | None, raw_size: int, known: Calibration | None) -> bytes:
    out = bytearray(raw_size)
    decode_frame_into(frame, memoryview(out), key=KEY, kv=kv, calibration=known)
    return bytes(out)


def there_and_back(name: str, raw: bytes, made: ChunkLayout) -> bytes:
    frame = encode_frame(KEY, raw, made, codec_of(name))
    return decode(frame, made.kv, len(raw), calibration())


def rows_of(raw: bytes, kv: KVLayout, element: str = "bf16") -> np.ndarray:
    return to_float32(gather(np.frombuffer(raw, DTYPES[element]), kv))


@given(kv=arrangements, element=elements, seed=st.integers(0, 3), position=st.integers(0, 40))
def test_near_lossless_is_off_by_half_a_127th_of_the_largest_of_a_head(kv, element, seed, position):
    raw = chunk(kv, element, seed)
    restored = there_and_back("near-lossless", raw, layout(kv, element, position))
    before, after = rows_of(raw, kv, element), rows_of(restored, kv, element)
    largest = np.abs(before).reshape(TOKENS, -1, DIM).max(axis=2).repeat(DIM, axis=1)
    # Scales are rounded up to bf16, the result to the element.
    assert (np.abs(after - before) <= largest * (0.5 / 127 + 2**-8) * 1.01).all()


@given(kv=arrangements, element=elements, seed=st.integers(0, 3), position=st.integers(1, 40))
def test_a_transform_is_off_by_little_over_half_a_tokens_step_in_each_kept_coefficient(
    kv, element, seed, position
):
    raw = chunk(kv, element, seed)
    restored = there_and_back("balanced", raw, layout(kv, element, position))
    exact = rows_of(raw, kv, element)
    error = rows_of(restored, kv, element) - exact
    for band in calibration().bands:
        if len(band.frequencies):  # Errors of K are rotated with it: its length is what is kept.
            continue
        of_band = np.concatenate([error[:, kv.columns[s]] for s in band.sources], axis=1)
        coefficients = of_band @ band.analysis
        kept = band.deviation >= NARROWEST * STEP
        slack = 0.02 * np.abs(coefficients).max() + 2**-6 * np.abs(band.analysis).max() * 100
        whole = np.concatenate([exact[:, kv.columns[s]] for s in band.sources], axis=1)
        exact_levels = (whole - band.mean) @ band.level_weights + band.usual_level
        # One that is half way between two levels may be taken for either.
        levels = np.clip(np.ceil(exact_levels - 0.499), -MAX_LEVEL, MAX_LEVEL)
        steps = STEP * 2 ** (levels / 2)
        assert (np.abs(coefficients[:, kept]) <= 0.58 * steps[:, None] + slack).all()


@pytest.mark.parametrize("name", LOSSY)
def test_all_arrangements_of_the_same_values_restore_the_same_values(name):
    restored = [
        rows_of(there_and_back(name, chunk(kv), layout(kv)), kv) for kv in ARRANGEMENTS.values()
    ]
    for other in restored[1:]:
        np.testing.assert_array_equal(restored[0], other)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("kv", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_the_first_16_tokens_of_a_context_are_bit_exact_and_later_ones_are_not(name, kv):
    raw = chunk(kv)
    restored = there_and_back(name, raw, layout(kv, position=0))
    before, after = (gather(np.frombuffer(each, np.uint16), kv) for each in (raw, restored))
    np.testing.assert_array_equal(before[:16], after[:16])
    assert (before[16:] != after[16:]).any()


@pytest.mark.parametrize("name", LOSSY)
def test_a_frame_says_that_it_is_lossy_and_is_smaller_than_a_lossless_one(name):
    kv = ARRANGEMENTS["token, head, K then V"]
    raw = chunk(kv)
    frame = encode_frame(KEY, raw, layout(kv), codec_of(name))
    header = read_header(frame, max_raw_size=len(raw))
    assert (header.codec_name, header.lossless) == (name, False)
    assert len(frame) < 0.9 * len(encode_frame(KEY, raw, layout(kv), get_codec("lossless")))


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize(
    "made",
    [
        ChunkLayout("bf16", 16),
        ChunkLayout("u8", 16, ARRANGEMENTS["mixed"], 1),
        ChunkLayout("bf16", 16, planes.token_major((0,), 1, 8, HEADS, DIM), 1),
    ],
    ids=["unknown layout", "no float", "layout of another size"],
)
def test_without_a_fitting_layout_nothing_is_lost(name, made):
    raw = chunk(ARRANGEMENTS["mixed"])
    frame = encode_frame(KEY, raw, made, codec_of(name))
    assert read_header(frame, max_raw_size=len(raw)).lossless
    assert decode(frame, None, len(raw), None) == raw


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("element", DTYPES)
def test_a_chunk_with_a_value_that_is_not_finite_is_not_touched(name, value, element):
    kv = ARRANGEMENTS["mixed"]
    raw = np.frombuffer(chunk(kv, element), DTYPES[element]).copy()
    bits = np.array(value, np.float32).view(np.uint32) >> 16
    raw[777] = bits if element == "bf16" else value
    assert there_and_back(name, raw.tobytes(), layout(kv, element)) == raw.tobytes()


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e3, 1e30, 3e38])
def test_zero_tiny_and_huge_values_come_back_finite_and_near(name, scale):
    kv = ARRANGEMENTS["K transposed"]
    values = np.frombuffer(chunk(kv, "f32"), np.float32)
    raw = (values / np.abs(values).max() * np.float32(scale)).astype(np.float32).tobytes()
    before = np.frombuffer(raw, np.float32)
    after = np.frombuffer(there_and_back(name, raw, layout(kv, "f32")), np.float32)
    assert np.isfinite(after).all()
    if name == "near-lossless" or scale > 1e20:
        assert np.abs(after - before).max() <= 0.01 * scale


@pytest.mark.parametrize("name", LOSSY)
def test_every_truncation_and_every_flipped_bit_is_an_error(name):
    kv = planes.token_major(LAYERS, 1, TOKENS, HEADS, DIM)
    raw = chunk(kv)
    frame = encode_frame(KEY, raw, layout(kv, position=0), codec_of(name))
    for size in range(0, len(frame), 7):
        with pytest.raises(CodecError):
            decode(frame[:size], kv, len(raw), calibration())
    rng = random.Random(0)
    for bit in {*range(8 * 160), *rng.sample(range(8 * len(frame)), 1000)}:
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError):
            decode(bytes(damaged), kv, len(raw), calibration())


@pytest.mark.parametrize("name", LOSSY)
@given(seed=st.integers(0, 10**6), position=st.sampled_from([0, 1]))
def test_hostile_parts_raise_codec_errors_only_and_leave_finite_values(name, seed, position):
    """Past the checksum: what an adversary could make of a frame."""
    kv = ARRANGEMENTS["K transposed"]
    raw = chunk(kv)
    codec = codec_of(name)
    parts = [bytearray(part) for part in codec.encode(raw, layout(kv, position=position)).parts]
    rng = random.Random(seed)
    for _ in range(rng.randrange(1, 5)):
        part = rng.choice(parts)
        if rng.random() < 0.2:
            del part[rng.randrange(len(part) + 1) :]
        elif part:
            part[rng.randrange(len(part))] = rng.randrange(256)
    out = bytearray(len(raw))
    with contextlib.suppress(CodecError):
        codec.decode_into(parts, memoryview(out), layout(kv))
        own = rows_of(bytes(out), kv)[0 if position else 16 :]
        assert np.isfinite(own).all()


def test_another_calibration_is_refused_and_both_are_named():
    kv = ARRANGEMENTS["mixed"]
    raw = chunk(kv)
    frame = encode_frame(KEY, raw, layout(kv), codec_of("small"))
    theirs, ours = calibration(), calibration(1)
    with pytest.raises(CodecError, match=ours.fingerprint.hex()) as refused:
        decode(frame, kv, len(raw), ours)
    assert theirs.fingerprint.hex() in str(refused.value)


def test_a_calibrated_codec_without_a_calibration_says_how_to_make_one():
    with pytest.raises(CodecError, match="mcp-vllm codec calibrate MODEL"):
        get_codec("balanced")


def test_other_layers_than_the_frames_are_refused():
    kv = ARRANGEMENTS["token, head, K then V"]
    raw = chunk(kv)
    frame = encode_frame(KEY, raw, layout(kv), codec_of("near-lossless"))
    others = planes.token_major((0, 4), 1, TOKENS, HEADS, DIM)
    with pytest.raises(CodecError, match="other layers"):
        decode(frame, others, len(raw), calibration())
    with pytest.raises(CodecError, match="needs the KV layout"):
        decode(frame, None, len(raw), calibration())


def test_a_model_that_the_calibration_does_not_know_is_an_error_that_names_the_layer():
    kv = planes.token_major((0, 4), 1, TOKENS, HEADS, DIM)
    with pytest.raises(CodecError, match="layer=4"):
        encode_frame(KEY, chunk(kv), layout(kv), codec_of("small"))


def test_a_peer_may_decode_into_another_arrangement():
    sender, receiver = ARRANGEMENTS["token, head, K then V"], ARRANGEMENTS["mixed"]
    frame = encode_frame(KEY, chunk(sender), layout(sender), codec_of("balanced"))
    there = decode(frame, receiver, len(chunk(sender)), calibration())
    here = decode(frame, sender, len(there), calibration())
    np.testing.assert_array_equal(rows_of(there, receiver), rows_of(here, sender))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": 1}, "reaches past"),
        ({"num_tokens": 0}, "not positive"),
        ({"strides": (0, 1, 1)}, "not positive"),
        ({"first_token": 1}, "lacks some"),
    ],
)
def test_a_layout_that_does_not_cover_the_chunk_is_refused(change, message):
    good = planes.latent((0,), 1, 4, 8).planes[0]
    with pytest.raises(CodecError, match=message):
        KVLayout((dataclasses.replace(good, **change),))


def test_overlapping_planes_are_refused():
    first, second = planes.latent((0, 1), 1, 4, 8).planes
    with pytest.raises(CodecError, match="overlap"):
        KVLayout((first, dataclasses.replace(second, offset=0)))


def test_tokens_that_spread_more_or_less_than_usual_cost_no_more_bits_than_they_must():
    kv = ARRANGEMENTS["token, head, K then V"]
    codec = get_codec("small", calibration=calibration(), step=0.05)
    values = rows(TOKENS, 0)
    mean = values.mean(axis=0)
    wide = mean + (values - mean) * np.where(np.arange(TOKENS) % 2, 6, 1 / 6)[:, None]
    plan = plan_of(codec.calibration, kv, codec.step)
    coefficients, _, shifts = codec_transform._coefficients(
        wide.astype(np.float32), plan, 16, codec.step
    )
    coded = [
        integers.encode(coefficients, plan.columns, each, ROUNDING)
        for each in (shifts, np.zeros_like(shifts))
    ]
    sizes = [sum(map(len, parts)) for parts in coded]
    assert sizes[0] < 0.9 * sizes[1]


@pytest.mark.parametrize("name", ["balanced", "small"])
def test_a_step_that_keeps_no_coefficient_restores_the_means(name):
    kv = ARRANGEMENTS["token, head, K then V"]
    raw = chunk(kv)
    frame = encode_frame(KEY, raw, layout(kv), get_codec(name, calibration=calibration(), step=1e6))
    restored = rows_of(decode(frame, kv, len(raw), calibration()), kv)
    band = next(band for band in calibration().bands if not len(band.frequencies))
    of_band = np.concatenate([restored[:, kv.columns[s]] for s in band.sources], axis=1)
    np.testing.assert_allclose(of_band, np.tile(band.mean, (TOKENS, 1)), rtol=0.01, atol=1e-3)


def test_a_chunk_of_some_of_the_layers_is_coded_by_their_bands():
    kv = planes.token_major(LAYERS[1:], 1, TOKENS, HEADS, DIM)
    whole = ARRANGEMENTS["token, head, K then V"]
    values = rows(TOKENS, 0)
    columns = [values[:, whole.columns[source]] for source in kv.columns]
    elements = np.empty(kv.num_elements, np.uint16)
    scatter(from_float32(np.concatenate(columns, axis=1), elements.dtype), elements, kv)
    restored = there_and_back("balanced", elements.tobytes(), layout(kv))
    both = there_and_back("balanced", chunk(whole), layout(whole))
    of_both = [rows_of(both, whole)[:, whole.columns[source]] for source in kv.columns]
    np.testing.assert_array_equal(rows_of(restored, kv), np.concatenate(of_both, axis=1))


def test_heads_of_other_sizes_than_the_calibrations_are_refused_though_their_sum_fits():
    odd = KVLayout(
        tuple(
            Plane(layer, kind, HEADS, TOKENS, dim, offset, (dim, HEADS * dim, 1))
            for index, layer in enumerate(LAYERS)
            for kind, dim, offset in (
                ("k", 4, index * HEADS * TOKENS * 2 * DIM),
                ("v", 2 * DIM - 4, index * HEADS * TOKENS * 2 * DIM + HEADS * TOKENS * 4),
            )
        )
    )
    raw = bytes(2 * odd.num_elements)
    with pytest.raises(CodecError, match="another head size"):
        encode_frame(KEY, raw, layout(odd), codec_of("balanced"))


def test_coefficients_are_those_that_the_transform_of_tensors_gives():
    torch = pytest.importorskip("torch")
    kv = ARRANGEMENTS["token, head, K then V"]
    values = rows(TOKENS, 0)
    plan = plan_of(calibration(), kv, STEP)
    ours, levels, _ = codec_transform._coefficients(values, plan, 16, STEP)
    (index,) = [n for n, band in enumerate(plan.bands) if not len(band.frequencies)]
    band, (first, past) = plan.bands[index], plan.kept[index]
    of_band = np.concatenate([values[:, kv.columns[s]] for s in band.sources], axis=1)
    theirs = codec_transform.to_coefficients(torch.from_numpy(of_band), band, past - first)
    steps = STEP * 2.0 ** (levels[:, index, None] / 2)
    np.testing.assert_allclose(ours[:, first:past] * steps, theirs.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("place", "least"), [(2, 15), (5, 7)])
def test_a_move_past_the_tables_is_refused(place, least):
    planes_of_bytes = bytearray([7] * 4 + [3] * 4)
    part = compressor(1).compress(bytes(planes_of_bytes))
    shifts, levels = codec_transform._unpacked(memoryview(part), 2, 2)
    assert not shifts.any()
    assert not levels.any()
    for moved in range(least, 256):
        planes_of_bytes[place] = moved
        part = compressor(1).compress(bytes(planes_of_bytes))
        with pytest.raises(FrameError, match="past the tables"):
            codec_transform._unpacked(memoryview(part), 2, 2)
