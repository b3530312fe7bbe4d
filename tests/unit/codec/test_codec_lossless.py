"""What `lossless` promises beyond round trips: ratio on any page layout, and hostile heads."""

import contextlib
import random
import struct

import numpy as np
import pytest
import zstandard
from kv_chunks import bf16_kv

from mcp_vllm.codec import ChunkLayout, FrameError, decode_frame_into, encode_frame, get_codec

LAYOUT = ChunkLayout("bf16", 64)


def transposed(page: np.ndarray) -> np.ndarray:
    return page.T


def packed_keys(page: np.ndarray) -> np.ndarray:
    """[token / 16, channel / 2, 16, 2]: two channels interleaved."""
    tokens, channels = page.shape
    return page.reshape(tokens // 16, 16, channels // 2, 2).transpose(0, 2, 1, 3)


def packed_values(page: np.ndarray) -> np.ndarray:
    """[channel / 16, token / 2, 16, 2]: two tokens interleaved."""
    tokens, channels = page.shape
    return page.reshape(tokens // 2, 2, channels // 16, 16).transpose(2, 0, 3, 1)


def row_major(page: np.ndarray) -> np.ndarray:
    return page


def encoded_size(raw: bytes, layout: ChunkLayout, codec_name: str = "lossless") -> int:
    return len(encode_frame(b"key", raw, layout, get_codec(codec_name)))


def pages(arrange, num_pages: int = 8) -> bytes:
    """Pages of 128 tokens and 64 channels, each of a layer of its own, as a backend stores them."""
    layers = [np.frombuffer(bf16_kv(128, 64, seed), np.uint16) for seed in range(num_pages)]
    return b"".join(arrange(layer.reshape(128, 64)).tobytes() for layer in layers)


@pytest.mark.parametrize("arrange", [row_major, transposed, packed_keys, packed_values])
def test_every_page_layout_is_recognised_without_being_told(arrange):
    best = encoded_size(pages(row_major), LAYOUT)
    assert encoded_size(pages(arrange), LAYOUT) < 1.02 * best


@pytest.mark.parametrize("channels", [1, 48, 100, 128, 2**32 - 1])
def test_a_wrong_number_of_channels_costs_little_and_still_beats_byte_planes(channels):
    raw = pages(row_major)
    size = encoded_size(raw, ChunkLayout("bf16", channels))
    assert size < 1.06 * encoded_size(raw, LAYOUT)
    assert size < encoded_size(raw, LAYOUT, "zstd")


def test_zeros_among_the_values_cost_little():
    raw = np.frombuffer(pages(row_major), np.uint16).copy()
    full = encoded_size(raw.tobytes(), LAYOUT)
    raw[np.random.default_rng(0).random(raw.size) < 0.02] = 0
    assert encoded_size(raw.tobytes(), LAYOUT) < 1.02 * full


@pytest.mark.parametrize(("element", "dtype"), [("f16", np.float16), ("f32", np.float32)])
def test_wider_elements_use_their_own_exponent(element, dtype):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(512, 64)) * np.exp2(rng.normal(size=64))
    raw = values.astype(dtype).tobytes()
    assert encoded_size(raw, ChunkLayout(element, 64)) < encoded_size(
        raw, ChunkLayout(element, 64), "zstd"
    )


def test_floats_widened_from_bf16_lose_their_empty_bytes():
    raw = (np.frombuffer(pages(row_major), np.uint16).astype(np.uint32) << 16).tobytes()
    assert encoded_size(raw, ChunkLayout("f32", 64)) < 1.06 * encoded_size(pages(row_major), LAYOUT)


def test_an_empty_page_costs_nearly_nothing():
    assert encoded_size(bytes(1 << 20), LAYOUT) < 4096


def decode_parts(parts: list[bytes], raw_size: int) -> None:
    get_codec("lossless").decode_into(parts, memoryview(bytearray(raw_size)), LAYOUT)


def test_hostile_heads_never_reach_beyond_their_tables():
    raw = bf16_kv(64, 64)
    parts = [bytes(part) for part in get_codec("lossless").encode(raw, LAYOUT).parts]
    head = zstandard.decompress(parts[0][4:])
    rng = random.Random(0)
    for _ in range(3000):
        damaged = bytearray(head)
        for _ in range(rng.randrange(1, 4)):
            # Mostly the structure at the front and the tables at the end, not the classes between.
            index = rng.choice([rng.randrange(8), rng.randrange(len(head))])
            damaged[index] = rng.choice([0, 1, 255, rng.randrange(256)])
        del damaged[rng.choice([len(head), rng.randrange(len(head))]) :]
        part = struct.pack("<I", len(damaged)) + zstandard.compress(bytes(damaged))
        with contextlib.suppress(FrameError):
            decode_parts([part, *parts[1:]], len(raw))


def test_hostile_streams_never_reach_beyond_their_words():
    raw = bf16_kv(64, 64)
    head, stream, *planes = (
        bytes(part) for part in get_codec("lossless").encode(raw, LAYOUT).parts
    )
    rng = random.Random(0)
    for size in [0, 2, 62, 63, 64, 66, len(stream) - 2, len(stream), len(stream) + 2]:
        with pytest.raises(FrameError):
            decode_parts([head, rng.randbytes(size), *planes], len(raw))


def test_a_head_that_claims_a_terabyte_is_refused():
    raw = bf16_kv(64, 64)
    parts = [bytes(part) for part in get_codec("lossless").encode(raw, LAYOUT).parts]
    bomb = zstandard.compress(bytes(64 << 20))
    for claim in (64 << 20, 2**32 - 1):
        with pytest.raises(FrameError, match="claims"):
            decode_parts([struct.pack("<I", claim) + bomb, *parts[1:]], len(raw))


def test_a_residual_plane_that_is_a_bomb_is_refused():
    raw = bf16_kv(64, 64)
    parts = [bytes(part) for part in get_codec("lossless").encode(raw, LAYOUT).parts]
    with pytest.raises(FrameError, match="claims"):
        decode_parts([*parts[:2], zstandard.compress(bytes(64 << 20))], len(raw))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_memory_at_odd_addresses_is_read_and_written(offset):
    raw = bf16_kv(100, 64)
    shifted = memoryview(bytes(offset) + raw)[offset:]
    frame = encode_frame(b"key", shifted, LAYOUT, get_codec("lossless"))
    out = bytearray(len(raw) + offset)
    shifted_frame = memoryview(bytes(offset) + frame)[offset:]
    decode_frame_into(shifted_frame, memoryview(out)[offset:], key=b"key")
    assert out[offset:] == raw
