"""The compressors that benchmarks/codec.py runs: ours as whole frames, others as they come.

Each is a pair of functions over bytes; those of a library that is not installed are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import zstandard

from mcp_vllm.codec import ChunkLayout, Codec, decode_frame_into, encode_frame, get_codec
from mcp_vllm.codec.calibration import Calibration

if TYPE_CHECKING:
    from typing_extensions import Buffer

KEY = bytes(32)
STEPS = ("small:0.014", "small:0.02", "small:0.03")


class Chunk(bytes):
    """Raw bytes that know how many chunks of their context came before."""

    position: int

    def __new__(cls, raw: bytes, position: int) -> Chunk:
        chunk = super().__new__(cls, raw)
        chunk.position = position
        return chunk


@dataclass(frozen=True)
class Contender:
    """``decode`` gets what ``encode`` gave, and the raw size in bytes."""

    name: str
    encode: Callable[[Chunk], bytes]
    decode: Callable[[bytes, int], Buffer]
    ours: bool = False
    lossless: bool = True


def _frames(
    name: str, codec: Codec, layout: ChunkLayout, calibration: Calibration | None = None
) -> Contender:
    """Header, checksums and key check included."""

    def decode(frame: bytes, raw_size: int) -> memoryview:
        out = memoryview(np.empty(raw_size, np.uint8))
        decode_frame_into(frame, out, key=KEY, kv=layout.kv, calibration=calibration)
        return out

    def encode(raw: Chunk) -> bytes:
        return encode_frame(KEY, raw, replace(layout, position=raw.position), codec)

    return Contender(f"mcp {name}", encode, decode, ours=True, lossless=codec.lossless)


def lossy_contenders(layout: ChunkLayout, calibration: Calibration | None) -> list[Contender]:
    """The tiers, and steps between and beyond them; without a calibration the one that needs none.

    ``layout`` knows its planes.
    """
    made = [_frames("near-lossless", get_codec("near-lossless"), layout)]
    for label in ("balanced", "small", *STEPS) if calibration else ():
        name, _, step = label.partition(":")
        codec = get_codec(name, calibration=calibration, step=float(step) if step else None)
        made.append(_frames(label, codec, layout, calibration))
    return made


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
    """All without loss that can run here, ours first."""
    made = [
        _frames("raw", get_codec("raw"), layout),
        *(_frames(f"zstd-{n} (byte planes)", get_codec("zstd", n), layout) for n in (1, 3, 9)),
        _frames("lossless", get_codec("lossless"), layout),
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
