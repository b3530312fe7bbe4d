"""The compressors that benchmarks/codec.py runs: ours as whole frames, others as they come.

Each is a pair of functions over bytes; those of a library that is not installed are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import zstandard

from mcp_vllm.codec import ChunkLayout, decode_frame_into, encode_frame, get_codec

KEY = bytes(32)


@dataclass(frozen=True)
class Contender:
    """``decode`` gets what ``encode`` gave, and the raw size in bytes."""

    name: str
    encode: Callable[[bytes], bytes]
    decode: Callable[[bytes, int], bytes | bytearray]
    ours: bool = False


def _frames(name: str, codec_name: str, level: int, layout: ChunkLayout) -> Contender:
    """Header, checksums and key check included."""
    codec = get_codec(codec_name, level)

    def decode(frame: bytes, raw_size: int) -> bytearray:
        out = bytearray(raw_size)
        decode_frame_into(frame, memoryview(out), key=KEY)
        return out

    return Contender(name, lambda raw: encode_frame(KEY, raw, layout, codec), decode, ours=True)


def _zstd(level: int) -> Contender:
    # A context a call: they are not thread-safe, and cheap beside a chunk.
    return Contender(
        f"raw + zstd-{level}",
        lambda raw: zstandard.ZstdCompressor(level=level).compress(raw),
        lambda blob, raw_size: zstandard.ZstdDecompressor().decompress(blob),
    )


def _lz4() -> Contender:
    frame = import_module("lz4.frame")
    return Contender("raw + lz4", frame.compress, lambda blob, raw_size: frame.decompress(blob))


def _blosc2(codec_name: str, filter_name: str, level: int) -> Contender:
    blosc2 = import_module("blosc2")
    options = {
        "typesize": 2,
        "clevel": level,
        "codec": blosc2.Codec[codec_name],
        "filters": [blosc2.Filter[filter_name]],
        "nthreads": 1,
    }
    return Contender(
        f"blosc2 {filter_name.lower()} {codec_name.lower()}-{level}",
        lambda raw: blosc2.compress2(raw, **options),
        lambda blob, raw_size: blosc2.decompress2(blob, nthreads=1),
    )


def _zipnn() -> Contender:
    zipnn = import_module("zipnn")

    def coder():
        return zipnn.ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)

    return Contender(
        "zipnn bf16",
        # It reorders its input in place, so it gets a copy.
        lambda raw: bytes(coder().compress(bytearray(raw))),
        lambda blob, raw_size: coder().decompress(blob),
    )


def _pcodec(level: int) -> Contender:
    """On integers of the same order as the floats, which is what suits it best."""
    standalone = import_module("pcodec").standalone
    config = import_module("pcodec").ChunkConfig(compression_level=level)

    def encode(raw: bytes) -> bytes:
        bits = np.frombuffer(raw, np.uint16)
        ordered = bits ^ np.where(bits >> 15, np.uint16(0xFFFF), np.uint16(0x8000))
        return standalone.simple_compress(ordered, config)

    def decode(blob: bytes, raw_size: int) -> bytes:
        ordered = standalone.simple_decompress(blob)
        bits = ordered ^ np.where(ordered >> 15, np.uint16(0x8000), np.uint16(0xFFFF))
        return bits.tobytes()

    return Contender(f"pcodec-{level}", encode, decode)


def contenders(layout: ChunkLayout) -> list[Contender]:
    """All that can run here, ours first."""
    made = [
        _frames("mcp raw", "raw", 3, layout),
        _frames("mcp zstd-1 (byte planes)", "zstd", 1, layout),
        _frames("mcp zstd-3 (byte planes)", "zstd", 3, layout),
        _frames("mcp zstd-9 (byte planes)", "zstd", 9, layout),
        _frames("mcp lossless", "lossless", 3, layout),
        *map(_zstd, (1, 3, 9)),
    ]
    for make in (
        _lz4,
        lambda: _blosc2("ZSTD", "SHUFFLE", 1),
        lambda: _blosc2("LZ4", "BITSHUFFLE", 1),
        _zipnn,
        lambda: _pcodec(8),
    ):
        try:
            made.append(make())
        except ImportError as error:
            print(f"left out: {error.name} is not installed (pip install 'mcp-vllm[bench]')")
    return made
