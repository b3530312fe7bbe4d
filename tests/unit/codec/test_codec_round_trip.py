"""Any bytes survive any lossless codec, whatever the layout claims."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given
from kv_chunks import bf16_kv, chunks, layouts

from mcp_vllm.codec import (
    FRAME_PREFIX_SIZE,
    ChunkLayout,
    decode_frame_into,
    encode_frame,
    get_codec,
    lossless_names,
    read_header,
)

KEY = b"chunk"


def round_trip(raw: bytes, layout: ChunkLayout, codec_name: str) -> bytes:
    frame = encode_frame(KEY, raw, layout, get_codec(codec_name))
    header = read_header(frame[:FRAME_PREFIX_SIZE], max_raw_size=len(raw))
    assert header.frame_size == len(frame) <= header.header_size + len(raw)
    assert header.layout == layout
    assert header.lossless
    out = bytearray(len(raw))
    assert decode_frame_into(frame, memoryview(out), key=KEY) == header
    return bytes(out)


@pytest.mark.parametrize("codec_name", lossless_names())
@given(raw=chunks, layout=layouts)
@example(raw=b"", layout=ChunkLayout("bf16", 64))
@example(raw=b"\x00", layout=ChunkLayout("f32", 64))
def test_any_bytes_survive(codec_name, raw, layout):
    assert round_trip(raw, layout, codec_name) == raw


@pytest.mark.parametrize("codec_name", lossless_names())
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 128, 1000])
def test_kv_of_any_length_survives(codec_name, num_tokens):
    raw = bf16_kv(num_tokens, 64)
    assert round_trip(raw, ChunkLayout("bf16", 64), codec_name) == raw


@pytest.mark.parametrize("codec_name", lossless_names())
def test_two_threads_share_one_codec(codec_name):
    codec = get_codec(codec_name)
    layout = ChunkLayout("bf16", 64)

    def encode_and_decode(seed: int) -> bool:
        raw = bf16_kv(200, 64, seed)
        out = bytearray(len(raw))
        decode_frame_into(encode_frame(KEY, raw, layout, codec), memoryview(out), key=KEY)
        return out == raw

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(encode_and_decode, range(40)))


def test_multidimensional_arrays_are_accepted_as_they_are():
    raw = np.frombuffer(bf16_kv(32, 64), np.uint16).reshape(2, 16, 64)
    out = np.empty_like(raw)
    frame = encode_frame(KEY, raw, ChunkLayout("bf16", 64), get_codec("zstd"))
    decode_frame_into(frame, memoryview(out), key=KEY)
    assert (out == raw).all()
