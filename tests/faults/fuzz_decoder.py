"""Coverage-guided fuzzing of everything that decodes bytes from outside, with Atheris (libFuzzer).

    make fuzz                                            (ten minutes)
    python tests/faults/fuzz_decoder.py --minutes 10     (where `pip install atheris` was run)

Frames of every registered codec, deltas, and exports of Hugging Face caches. Mutated input is
*mended* first: sizes and header checksums are made right, so that it gets past them. Whatever
is decoded, only the package's own errors may come out, and memory stays within a bound (RLIMIT_AS).

Frames are fuzzed three ways: with the kernels compiled with bounds checks, where an index out of
range is an error and not a read of foreign memory; as plain Python, where the fuzzer sees their
branches, on the corpus of the former; and compiled as users run them. In the first two, what
zstandard would compress is stored, since no mutation of a compressed part gets far. Corpus and
findings stay in build/fuzz. Exit code 0 means that nothing was found.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import FunctionType

import atheris
import numpy as np
import xxhash

# The compiler takes no instrumented function: where it is at work, what stays Python is
# instrumented after the kernels are compiled.
PYTHON_KERNELS = os.environ.get("NUMBA_DISABLE_JIT") == "1"

# A made-up model's calibration and chunks, for the lossy tiers.
sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "codec"))

with atheris.instrument_imports(include=["mcp_vllm"]) if PYTHON_KERNELS else nullcontext():
    import lossy_kv

    from mcp_vllm import hf
    from mcp_vllm.codec import (
        ChunkLayout,
        byte_planes,
        codec_names,
        decode_frame_into,
        encode_frame,
        get_codec,
        integers,
        lossless,
        lossless_names,
        needs_calibration,
        read_header,
    )
    from mcp_vllm.codec.errors import CodecError, FrameError
    from mcp_vllm.errors import McpError
    from mcp_vllm.session import delta as deltas

    CALIBRATION = lossy_kv.calibration()
    KV = lossy_kv.ARRANGEMENTS["K transposed"]
    CODECS = {
        name: get_codec(name, calibration=CALIBRATION if needs_calibration(name) else None)
        for name in codec_names()
    }

BUILD = Path(__file__).parents[2] / "build" / "fuzz"
MAX_INPUT_BYTES = 8192
MAX_RAW_BYTES = 1 << 16
SPARE_MEMORY_BYTES = 1 << 30
STORED = b"STOR"
# Their checksum is of the parts.
LOSSY_IDS = (3, 4, 5)
# The lossy codecs that deltas may be coded with.
DELTA_LOSS = ("near-lossless",)

# Target, how kernels run, share of the time.
ROUNDS = (
    ("frame", "checked", 0.2),
    ("frame", "python", 0.25),
    ("frame", "compiled", 0.15),
    ("delta", "compiled", 0.2),
    ("cache", "compiled", 0.2),
)


# Mending: sizes and checksums of a mutated input made right.


def mend_frame(frame: bytearray) -> None:
    """Parts that add up, and the header's checksum, if the frame is long enough to have them."""
    if len(frame) < 56:
        return
    frame[7] %= 13
    frame[12:14] = (min(int.from_bytes(frame[12:14], "little"), 16)).to_bytes(2, "little")
    table, num_parts = 48 + frame[12], frame[7]
    body = table + 8 * num_parts + 8
    if len(frame) < body:
        return
    room = len(frame) - body
    for number in range(num_parts):
        at = table + 8 * number
        size = min(int.from_bytes(frame[at : at + 8], "little"), room)
        room -= size
        if number == num_parts - 1:
            size += room
        frame[at : at + 8] = size.to_bytes(8, "little")
    frame[24:32] = len(frame).to_bytes(8, "little")
    if frame[5] in LOSSY_IDS:
        frame[32:48] = xxhash.xxh3_128_digest(frame[body:])
    frame[body - 8 : body] = xxhash.xxh3_64_digest(frame[: body - 8])


def mend_delta(delta: bytearray) -> None:
    """The delta's own size and checksum, and its first frame."""
    if len(delta) < 32:
        return
    end = 24 + min(int.from_bytes(delta[16:20], "little"), len(delta) - 32)
    delta[16:20] = (end - 24).to_bytes(4, "little")
    frames = delta[end + 8 :]
    size = min(int.from_bytes(frames[24:32], "little"), len(frames))
    first_frame = frames[:size]
    mend_frame(first_frame)
    delta[end + 8 :] = first_frame + frames[size:]
    delta[8:16] = len(delta).to_bytes(8, "little")
    delta[end : end + 8] = xxhash.xxh3_64_digest(delta[:end])


def mend_export(export: bytearray) -> None:
    """The export's checksum, and its delta."""
    if len(export) < 20:
        return
    end = 12 + min(int.from_bytes(export[8:12], "little"), len(export) - 20)
    export[8:12] = (end - 12).to_bytes(4, "little")
    export[end : end + 8] = xxhash.xxh3_64_digest(export[:end])
    delta = export[end + 8 :]
    mend_delta(delta)
    export[end + 8 :] = delta


# Targets: what is fed, and valid inputs to start from.


def some_floats(num_values: int) -> np.ndarray:
    """bf16 bit patterns of gaussians."""
    values = np.random.default_rng(0).normal(size=num_values).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def feed_frame(frame: bytes) -> None:
    raw_size = int.from_bytes(frame[16:24], "little") if len(frame) >= 24 else 0
    out = memoryview(bytearray(min(raw_size, MAX_RAW_BYTES)))
    key_end = 48 + int.from_bytes(frame[12:14], "little")
    read_header(frame, max_raw_size=MAX_RAW_BYTES)
    decode_frame_into(frame, out, key=frame[48:key_end], kv=KV, calibration=CALIBRATION)


def frame_seeds() -> Iterator[bytes]:
    kinds = (("bf16", 8), ("f16", 1), ("f32", 4), ("f8", 2), ("u8", 1))
    for name in set(codec_names()) - set(lossless_names()):
        for position in (0, 1):
            layout = lossy_kv.layout(KV, position=position)
            yield encode_frame(b"key", lossy_kv.chunk(KV), layout, CODECS[name])
    for name in lossless_names():
        for element, channels in kinds:
            for num_values in (0, 3, 700, 2500):
                raw = some_floats(num_values).tobytes() + b"odd"
                layout = ChunkLayout(element, channels)  # type: ignore[arg-type]
                yield encode_frame(b"key", raw, layout, CODECS[name])


def example_contexts() -> list[dict[str, np.ndarray]]:
    """Three turns of a context with growth, a moved window, an addition and a removal."""
    turns: list[dict[str, np.ndarray]] = [{}]
    values = some_floats(4 * 64 * 8).view(np.float16).reshape(1, 4, 64, 8)
    for turn in (1, 2):
        past = 20 * turn
        context = {
            "grows": values[:, :2, :past],
            "moves": values[:, 2:, past - 16 : past],
            f"only{turn}": np.arange(turn + 3),
            "same": np.ones((3, 0), np.float32),
        }
        turns.append(context)
    return turns


CONTEXTS = example_contexts()


def feed_delta(delta: bytes) -> None:
    for base in CONTEXTS:
        try:
            deltas.decompress_context(base, delta, max_bytes=1 << 20, accept=DELTA_LOSS)
        except deltas.WrongBaseError:
            continue


def delta_seeds() -> Iterator[bytes]:
    for old in CONTEXTS:
        for new in CONTEXTS:
            for name in (*lossless_names(), *DELTA_LOSS):
                yield deltas.compress_context(old, new, codec=name)


class CacheTarget:
    """Exports of a small cache with full and sliding layers, growing and static."""

    def __init__(self) -> None:
        import torch
        from transformers import DynamicCache, Gemma3TextConfig, StaticCache

        self.config = Gemma3TextConfig(
            num_hidden_layers=2,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
        generator = torch.Generator().manual_seed(0)
        self.chats: list[hf.CachedChat] = []
        for make in (
            lambda: DynamicCache(config=self.config),
            DynamicCache,
            lambda: StaticCache(config=self.config, max_cache_len=32),
        ):
            cache, ids = make(), torch.arange(12)[None]
            for layer in range(2):
                keys, values = torch.randn(2, 1, 1, 12, 8, generator=generator).bfloat16()
                cache.update(keys, values, layer)
            self.chats.append(hf.snapshot(cache, ids))

    def feed(self, export: bytes) -> None:
        for base in (None, self.chats[0]):
            given = {"max_bytes": 1 << 20, "accept": DELTA_LOSS}
            hf.import_cache(export, self.config, base=base, **given)

    def seeds(self) -> Iterator[bytes]:
        for chat in self.chats:
            for base in (None, self.chats[0]):
                for codec in ("zstd", *DELTA_LOSS):
                    yield hf.export_cache(
                        chat.cache, self.config, token_ids=chat.token_ids, base=base, codec=codec
                    )


def instrument_python() -> None:
    """Coverage of every Python function of ours, with the kernels left as compiled."""
    modules = [each for name, each in sys.modules.items() if name.startswith("mcp_vllm.")]
    for module in modules:
        for owner in [module, *(each for each in vars(module).values() if isinstance(each, type))]:
            for value in list(vars(owner).values()):
                function = getattr(value, "__func__", value)
                if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                    atheris.instrument_func(function)


# One round: one process, one target, one way to run the kernels.


def store_instead_of_compressing() -> None:
    """Make zstandard parts readable for the mutator, in encoders and decoders alike."""
    really_decompress = byte_planes.decompress_exactly

    class Store:
        def compress(self, raw: bytes) -> bytes:
            return STORED + bytes(raw)

    def decompress_exactly(blob: memoryview, size_bytes: int) -> bytes:
        if bytes(blob[:4]) != STORED:
            return really_decompress(blob, size_bytes)
        if len(blob) - 4 != size_bytes:
            raise FrameError("stored part of another size")
        return bytes(blob[4:])

    for module in list(sys.modules.values()):
        if module.__name__.startswith("mcp_vllm.codec"):
            if hasattr(module, "decompress_exactly"):
                module.decompress_exactly = decompress_exactly  # type: ignore[attr-defined]
            if hasattr(module, "compressor"):
                module.compressor = lambda level: Store()  # type: ignore[attr-defined]


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_round(target: str, kernels: str, seconds: int) -> None:
    """Fuzz until the time is over; does not return, the exit code says whether all was well."""
    if not PYTHON_KERNELS:
        instrument_python()
    if kernels != "compiled":
        store_instead_of_compressing()
        # Chunks short enough for thousands of runs a second take the path of long ones.
        lossless.MIN_SYMBOLS = lossless.SYMBOLS_PER_CLASS = 16
    # The same for the vector loop of long streams.
    lossless.MANY_LANES_FROM = integers.MANY_LANES_FROM = 1024
    warnings.simplefilter("ignore")  # Plain Python kernels overflow as the compiled ones do.
    feed, mend, seeds, allowed = _parts_of(target)
    folder = BUILD / f"{target}-{'real' if kernels == 'compiled' else 'stored'}"
    folder.mkdir(parents=True, exist_ok=True)
    # The kernels of encoders do not run as plain Python: that round has the seeds of the first.
    for number, seed in enumerate(() if PYTHON_KERNELS else seeds):
        (folder / f"seed-{number:03}").write_bytes(b"\x01" + seed)

    def run_once(data: bytes) -> None:
        content = bytearray(data[1:])
        if data[:1] != b"\x00":
            mend(content)
        try:
            feed(bytes(content))
        except allowed:
            return

    limit_memory()
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-artifact_prefix={BUILD}/found-{target}-{kernels}-",
        "-timeout=30",
        "-rss_limit_mb=0",
        "-verbosity=1",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(folder)], run_once)
    atheris.Fuzz()


def _parts_of(
    target: str,
) -> tuple[
    Callable[[bytes], None],
    Callable[[bytearray], None],
    Iterator[bytes],
    type[Exception],
]:
    if target == "frame":
        return feed_frame, mend_frame, frame_seeds(), CodecError
    if target == "delta":
        return feed_delta, mend_delta, delta_seeds(), deltas.DeltaError
    cache = CacheTarget()
    return cache.feed, mend_export, cache.seeds(), McpError


def run_all(minutes: float) -> int:
    """Every round in a process of its own; the number of rounds that found something."""
    failures = 0
    with tempfile.TemporaryDirectory() as numba_cache:
        for target, kernels, share in ROUNDS:
            environment = dict(os.environ)
            if kernels == "python":
                environment["NUMBA_DISABLE_JIT"] = "1"
            elif kernels == "checked":
                # Code with checks must not end up in the cache of code without.
                environment |= {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": numba_cache}
            seconds = max(1, round(60 * minutes * share))
            print(f"--- {target}, kernels {kernels}: {seconds} s", flush=True)
            command = [sys.executable, __file__, "--round", target, kernels, str(seconds)]
            failures += subprocess.run(command, env=environment, check=False).returncode != 0
    print(f"{failures} of {len(ROUNDS)} rounds found something" if failures else "nothing found")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--round", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.round:
        target, kernels, seconds = arguments.round
        run_round(target, kernels, int(seconds))
    else:
        raise SystemExit(min(1, run_all(arguments.minutes)))


if __name__ == "__main__":
    main()
