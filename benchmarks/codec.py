"""Ratio and speed of our codecs and others on real KV, in one run.

    python benchmarks/kv_dump.py MODEL_FOLDER KV_FOLDER
    python benchmarks/codec.py KV_FOLDER [--pages gpu16] [--json F] [--picture F.png]
        [--calibration F.npz] [--quality F.json]

A chunk is one block of every layer, as vLLM hands it over: ``gpu16`` 16 tokens a block, K and V as
[token, channel]; ``cpu128`` 128 tokens, K as [channel, token]; ``layer16`` 16 tokens of one layer's
K or V alone, the smallest frame there is. One-thread speeds are CPU time, so that other work on the
machine disturbs them little; all-thread speeds are wall time. MB are 10**6 raw bytes. The lossy
tiers need the model's calibration, and what they cost is read from a JSON of `mcp-vllm bench
quality`. The first chunk of each text is left out: there they keep 16 tokens exact.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from contenders import Chunk, Contender, contenders, lossy_contenders

from mcp_vllm.codec import ChunkLayout, KVLayout, Plane, planes
from mcp_vllm.codec.calibration import Calibration

REPEATS = 3


@dataclass(frozen=True)
class Result:
    """One contender over all chunks; ``dppl_percent`` is the perplexity it costs, if known."""

    name: str
    lossless: bool
    ratio: float
    bits_per_value: float
    encode_mb_s: float
    decode_mb_s: float
    encode_all_mb_s: float
    decode_all_mb_s: float
    dppl_percent: float | None


def cut_chunks(kv: np.ndarray, pages: str) -> list[Chunk]:
    """All chunks but the first of uint16 [layer, K or V, head, token, channel]."""
    num_tokens = 128 if pages == "cpu128" else 16
    chunks: list[Chunk] = []

    def add(tensor: np.ndarray, start: int) -> None:
        chunks.append(Chunk(tensor.tobytes(), start // num_tokens))

    for start in range(num_tokens, kv.shape[3] - num_tokens + 1, num_tokens):
        block = kv[:, :, :, start : start + num_tokens]
        if pages == "layer16":
            for layer in range(len(kv)):
                add(block[layer, 0], start)
                add(block[layer, 1], start)
        elif pages == "gpu16":
            add(block.transpose(0, 2, 1, 3, 4), start)
        else:
            keys = block[:, 0].transpose(0, 1, 3, 2).reshape(*block.shape[:1], kv.shape[2], -1)
            values = block[:, 1].reshape(*block.shape[:1], kv.shape[2], -1)
            add(np.stack([keys, values], axis=2), start)
    return chunks


def layout_of(kv: np.ndarray, pages: str) -> KVLayout:
    """Of the chunks that cut_chunks cuts, but for ``layer16``."""
    num_layers, _, num_heads, _, head_dim = kv.shape
    if pages == "cpu128":
        return planes.channel_major_keys(tuple(range(num_layers)), 1, 128, num_heads, head_dim)
    size = 16 * head_dim
    strides = (2 * size, head_dim, 1)
    return KVLayout(
        tuple(
            Plane(
                layer, name, num_heads, 16, head_dim, (2 * layer * num_heads + kind) * size, strides
            )
            for layer in range(num_layers)
            for kind, name in enumerate(("k", "v"))
        )
    )


def sample(chunks: list[Chunk], max_bytes: int) -> list[Chunk]:
    """Evenly spread chunks of about ``max_bytes`` in all."""
    return chunks[:: max(1, sum(map(len, chunks)) // max_bytes)]


def cpu_time_s(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def wall_time_s(function: Callable, arguments: list, num_threads: int) -> float:
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(function, arguments))
        start = time.perf_counter()
        list(pool.map(function, arguments))
        return time.perf_counter() - start


def measure(contender: Contender, chunks: list[Chunk], dppl_percent: float | None) -> Result:
    blobs = [contender.encode(chunk) for chunk in chunks]
    sizes = [len(chunk) for chunk in chunks]
    for chunk, blob in zip(chunks, blobs, strict=True):
        if contender.lossless and bytes(contender.decode(blob, len(chunk))) != chunk:
            raise SystemExit(f"{contender.name} did not give back what it was given")
    raw_mb = sum(sizes) / 1e6
    pairs = list(zip(blobs, sizes, strict=True))
    num_threads = os.cpu_count() or 1
    ratio = sum(sizes) / sum(map(len, blobs))
    return Result(
        name=contender.name,
        lossless=contender.lossless,
        ratio=round(ratio, 4),
        bits_per_value=round(16 / ratio, 3),
        encode_mb_s=round(
            raw_mb / sum(cpu_time_s(lambda c=c: contender.encode(c)) for c in chunks)
        ),
        decode_mb_s=round(
            raw_mb / sum(cpu_time_s(lambda p=p: contender.decode(*p)) for p in pairs)
        ),
        encode_all_mb_s=round(raw_mb / wall_time_s(contender.encode, chunks, num_threads)),
        decode_all_mb_s=round(
            raw_mb / wall_time_s(lambda pair: contender.decode(*pair), pairs, num_threads)
        ),
        dppl_percent=0.0 if contender.lossless else dppl_percent,
    )


def dppl_by_name(quality: Path) -> dict[str, float]:
    """Of a report of `mcp-vllm bench quality`, by our contenders' names."""
    codecs = json.loads(quality.read_text())["codecs"]
    return {f"mcp {codec['name']}": codec["dppl_percent"] for codec in codecs}


def print_table(results: list[Result], setting: str) -> None:
    print(setting)
    print(f"{'':28}{'ratio':>7}{'bits':>7}  encode MB/s: 1, all   decode MB/s: 1, all   dPPL %")
    for r in results:
        print(
            f"{r.name:28}{r.ratio:7.3f}{r.bits_per_value:7.2f}"
            f"{r.encode_mb_s:12.0f}{r.encode_all_mb_s:9.0f}{r.decode_mb_s:14.0f}{r.decode_all_mb_s:8.0f}"
            f"{'' if r.dppl_percent is None else format(r.dppl_percent, '+9.2f')}"
        )


def draw(results: list[Result], setting: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
    for axis, direction in zip(axes, ("encode", "decode"), strict=True):
        for result in results:
            speed = getattr(result, f"{direction}_mb_s")
            ours = result.name.startswith("mcp")
            shape = "o" if result.lossless else "s"
            axis.plot(speed, result.ratio, shape, color="tab:red" if ours else "tab:gray")
            axis.annotate(
                result.name
                if result.lossless or result.dppl_percent is None
                else f"{result.name}: perplexity {result.dppl_percent:+.2f} %",
                (speed, result.ratio),
                xytext=(5, 4),
                textcoords="offset points",
                size=8,
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(f"{direction}, MB of raw KV per second of one core")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ratio (squares: lossy)")
    figure.suptitle(setting, size=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kv_folder", type=Path)
    parser.add_argument("--pages", choices=("gpu16", "cpu128", "layer16"), default="gpu16")
    parser.add_argument("--max-mb", type=int, default=24, help="raw KV to measure on")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--calibration", type=Path, help="file of `mcp-vllm codec calibrate`")
    parser.add_argument("--quality", type=Path, help="JSON of `mcp-vllm bench quality`")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    dumps = {path.stem: np.load(path) for path in sorted(args.kv_folder.glob("*.npy"))}
    if not dumps:
        raise SystemExit(f"no .npy in {args.kv_folder}; make some with benchmarks/kv_dump.py")
    layout = ChunkLayout("bf16", next(iter(dumps.values())).shape[-1])
    max_bytes = args.max_mb * 10**6 // len(dumps)
    of_text = {text: sample(cut_chunks(kv, args.pages), max_bytes) for text, kv in dumps.items()}
    chunks = [chunk for text_chunks in of_text.values() for chunk in text_chunks]
    setting = (
        f"{args.pages}: {len(chunks)} chunks of {len(chunks[0]) / 1e3:.0f} kB bf16 KV from"
        f" {', '.join(dumps)}; {platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    )
    measured = contenders(layout)
    if args.pages != "layer16":
        kv_layout = layout_of(next(iter(dumps.values())), args.pages)
        known = Calibration.load(args.calibration) if args.calibration else None
        lossy_layout = ChunkLayout("bf16", layout.channels, kv_layout)
        measured += lossy_contenders(lossy_layout, known)
    dppl = dppl_by_name(args.quality) if args.quality else {}
    results = [measure(each, chunks, dppl.get(each.name)) for each in measured]
    print_table(results, setting)
    ours = next(c for c in contenders(layout) if c.name == "mcp lossless")
    for text, text_chunks in of_text.items():
        ratio = sum(map(len, text_chunks)) / sum(len(ours.encode(chunk)) for chunk in text_chunks)
        print(f"mcp lossless on {text}: {ratio:.3f}")
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    if args.picture:
        draw(results, setting, args.picture)


if __name__ == "__main__":
    main()
