"""Whatever happens to a frame, the decoder raises CodecError or returns the right bytes."""

import contextlib
import random
import struct

import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from kv_chunks import bf16_kv

from mcp_vllm.codec import (
    ChecksumError,
    ChunkLayout,
    CodecError,
    FrameError,
    decode_frame_into,
    encode_frame,
    get_codec,
    lossless_names,
    read_header,
)

KEY = b"chunk"
LAYOUT = ChunkLayout("bf16", 16)
# Long enough that `lossless` takes its own path, and damage reaches every field of it.
RAW = bf16_kv(80, 16)


def small_frame(codec_name: str) -> bytes:
    frame = encode_frame(KEY, RAW, LAYOUT, get_codec(codec_name))
    assert read_header(frame, max_raw_size=len(RAW)).codec_name == codec_name
    return frame


def decode(frame: bytes) -> bytes:
    out = bytearray(len(RAW))
    decode_frame_into(frame, memoryview(out), key=KEY)
    return bytes(out)


def reseal(frame: bytearray) -> bytes:
    """The header checksum made right again: the damage of an adversary, not of a wire."""
    num_parts, key_size = frame[7], struct.unpack_from("<H", frame, 12)[0]
    end = 48 + key_size + 8 * num_parts
    frame[end : end + 8] = xxhash.xxh3_64_digest(frame[:end])
    return bytes(frame)


@pytest.mark.parametrize("codec_name", lossless_names())
def test_every_truncation_is_a_frame_error(codec_name):
    frame = small_frame(codec_name)
    for size in range(len(frame)):
        with pytest.raises(FrameError):
            decode(frame[:size])


@pytest.mark.parametrize("codec_name", lossless_names())
def test_every_flipped_bit_is_detected_or_harmless(codec_name):
    frame = small_frame(codec_name)
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert decode(bytes(damaged)) == RAW
        except (FrameError, ChecksumError):
            continue


@pytest.mark.parametrize("codec_name", lossless_names())
def test_every_flipped_header_bit_is_detected(codec_name):
    frame = small_frame(codec_name)
    for bit in range(8 * read_header(frame, max_raw_size=len(RAW)).header_size):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((FrameError, ChecksumError)):
            decode(bytes(damaged))


@pytest.mark.parametrize("codec_name", lossless_names())
def test_trailing_bytes_are_a_frame_error(codec_name):
    with pytest.raises(FrameError):
        decode(small_frame(codec_name) + b"\x00")


@pytest.mark.parametrize("codec_name", lossless_names())
@given(seed=st.integers(0, 10**6), num_bytes=st.integers(1, 40))
def test_hostile_parts_never_raise_anything_else(codec_name, seed, num_bytes):
    frame = bytearray(small_frame(codec_name))
    body = read_header(frame, max_raw_size=len(RAW)).header_size
    rng = random.Random(seed)
    start = rng.randrange(body, len(frame))
    for index in range(start, min(start + num_bytes, len(frame))):
        frame[index] = rng.randrange(256)
    with contextlib.suppress(FrameError, ChecksumError):
        assert decode(bytes(frame)) == RAW


def test_a_claim_of_a_terabyte_is_refused_before_anything_is_allocated():
    frame = bytearray(small_frame("raw"))
    struct.pack_into("<Q", frame, 16, 1 << 40)
    with pytest.raises(FrameError, match="at most"):
        read_header(reseal(frame), max_raw_size=1 << 20)


def test_part_sizes_that_contradict_the_frame_size_are_refused():
    frame = bytearray(small_frame("zstd"))
    struct.pack_into("<Q", frame, 48 + len(KEY), 1)
    with pytest.raises(FrameError, match="contradict"):
        decode(reseal(frame))


@pytest.mark.parametrize(("offset", "value"), [(5, 200), (6, 77), (14, 1)])
def test_values_outside_their_range_are_refused(offset, value):
    frame = bytearray(small_frame("zstd"))
    frame[offset] = value
    with pytest.raises(FrameError):
        decode(reseal(frame))


def test_a_zstandard_bomb_is_refused():
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(64 << 20))
    with pytest.raises(FrameError, match="claims"):
        get_codec("zstd").decode_into([bomb], memoryview(bytearray(4096)), ChunkLayout("u8"))


def test_a_zstandard_stream_of_unknown_size_is_refused():
    stream = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4096))
    with pytest.raises(FrameError):
        get_codec("zstd").decode_into([stream], memoryview(bytearray(4096)), ChunkLayout("u8"))


def test_a_frame_of_another_chunk_is_refused():
    with pytest.raises(FrameError, match="not 6f74686572"):
        decode_frame_into(small_frame("zstd"), memoryview(bytearray(len(RAW))), key=b"other")


def test_an_output_of_the_wrong_size_is_refused():
    frame = small_frame("zstd")
    for size in (0, len(RAW) - 1, len(RAW) + 1):
        with pytest.raises(FrameError):
            decode_frame_into(frame, memoryview(bytearray(size)), key=KEY)


def test_a_read_only_output_is_refused():
    with pytest.raises(CodecError, match="read-only"):
        decode_frame_into(small_frame("zstd"), memoryview(bytes(len(RAW))), key=KEY)
