"""How fast each codec is on this machine, measured once and remembered.

Measured on synthetic KV: normal values whose scale differs by channel, as attention keys and
values do. One thread; the process is usually young and the machine busy with an engine's start, so
the best of a few runs counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from mcp_vllm.codec.base import Codec
from mcp_vllm.codec.frame import decode_frame_into, encode_frame
from mcp_vllm.codec.layout import ChunkLayout

NUM_TOKENS = 512
CHANNELS = 256
REPEATS = 3
PLAIN = ChunkLayout("bf16", CHANNELS)
_KEY = b"speed"


class Speed(msgspec.Struct, frozen=True):
    """Raw bytes a second of one thread, and raw size over frame size."""

    encode_bytes_s: float
    decode_bytes_s: float
    ratio: float


def measure(
    codec: Codec, layout: ChunkLayout = PLAIN, num_bytes: int = 2 * NUM_TOKENS * CHANNELS
) -> Speed:
    """Encode and decode a chunk of that layout and size a few times."""
    raw = _synthetic_chunk(num_bytes)
    later = replace(layout, position=1)  # The first of a context is coded with more care.
    frame = encode_frame(_KEY, raw, later, codec)
    out = memoryview(bytearray(len(raw)))
    calibration = getattr(codec, "calibration", None)
    encode_s = _best_s(lambda: encode_frame(_KEY, raw, later, codec))
    decode_s = _best_s(
        lambda: decode_frame_into(frame, out, key=_KEY, kv=layout.kv, calibration=calibration)
    )
    return Speed(len(raw) / encode_s, len(raw) / decode_s, len(raw) / len(frame))


def remembered(
    codecs: Mapping[str, Codec],
    version: str,
    folder: Path,
    layout: ChunkLayout = PLAIN,
    num_bytes: int = 2 * NUM_TOKENS * CHANNELS,
) -> dict[str, Speed]:
    """The speeds of these codecs (by name), from the file of an earlier process where possible.

    `version` is the program's and what else makes codecs of one name differ. A file that cannot be
    read is replaced, one that cannot be written is done without.
    """
    path = folder / f"codec-speeds-{_machine(version)}.json"
    known = _read(path)
    missing = [name for name in codecs if name not in known]
    for name in missing:
        known[name] = measure(codecs[name], layout, num_bytes)
    if missing:
        with contextlib.suppress(OSError):
            _write(path, known)
    return {name: known[name] for name in codecs}


def _synthetic_chunk(num_bytes: int) -> bytes:
    """bf16 [token, channel], cut to that size; read as another type it is as good as any."""
    random = np.random.default_rng(0)
    scales = np.exp(random.normal(0, 1.5, CHANNELS))
    num_tokens = -(-num_bytes // (2 * CHANNELS))
    values = (random.normal(0, 1, (num_tokens, CHANNELS)) * scales).astype(np.float32)
    patterns: bytes = (values.view(np.uint32) >> 16).astype("<u2").tobytes()[:num_bytes]
    return patterns


def _best_s(run: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _machine(version: str) -> str:
    facts: Sequence[str] = (platform.machine(), platform.processor(), platform.node(), version)
    return hashlib.blake2b("\0".join(facts).encode(), digest_size=8).hexdigest()


def _read(path: Path) -> dict[str, Speed]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Speed])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return {}


def _write(path: Path, speeds: Mapping[str, Speed]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(msgspec.json.format(msgspec.json.encode(speeds)))
    os.replace(file.name, path)
