"""Names, levels and layouts that a user may get wrong."""

import subprocess
import sys

import pytest

from mcp_vllm.codec import ChunkLayout, CodecError, encode_frame, get_codec, lossless_names


def test_every_known_name_gives_its_codec():
    assert [get_codec(name).name for name in lossless_names()] == list(lossless_names())


def test_unknown_name_is_refused_with_the_nearest_known_one():
    with pytest.raises(CodecError, match="did you mean 'zstd'"):
        get_codec("zsdt")


@pytest.mark.parametrize("level", [0, -1, 23])
def test_level_outside_its_range_is_refused_by_name(level):
    with pytest.raises(CodecError, match=f"zstd level {level}"):
        get_codec("zstd", level=level)


@pytest.mark.parametrize("channels", [0, -1, 2**32])
def test_channels_outside_their_range_are_refused(channels):
    with pytest.raises(CodecError, match="channels"):
        ChunkLayout("bf16", channels)


def test_unknown_element_is_refused():
    with pytest.raises(CodecError, match="int4"):
        ChunkLayout("int4", 8)  # type: ignore[arg-type]


def test_key_longer_than_the_format_allows_is_refused():
    with pytest.raises(CodecError, match="256"):
        encode_frame(bytes(257), b"raw", ChunkLayout("u8"), get_codec("raw"))


def test_a_buffer_with_gaps_is_refused():
    with pytest.raises(CodecError, match="contiguous"):
        encode_frame(b"key", memoryview(bytes(16))[::2], ChunkLayout("u8"), get_codec("raw"))


def test_importing_the_package_loads_no_engine_no_network_and_no_compiler():
    heavy = ["numba", "torch", "vllm", "aiohttp"]
    check = f"import sys, mcp_vllm.codec; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
