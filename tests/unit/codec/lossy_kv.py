"""A small made-up model: its chunks in several arrangements, and its calibration."""

from functools import cache

import numpy as np

from mcp_vllm.codec import ChunkLayout, KVLayout, Plane, planes
from mcp_vllm.codec.calibration import Calibration
from mcp_vllm.codec.fit import fit_band, tail_of
from mcp_vllm.codec.planes import Source
from mcp_vllm.codec.values import from_float32, scatter

LAYERS, HEADS, DIM = (0, 3), 2, 16
TOKENS = 32
DTYPES = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}


def mixed_axes() -> KVLayout:
    """K as [token, head, channel], V as [channel, token, head], in turn."""
    size = HEADS * TOKENS * DIM
    made = []
    for index, layer in enumerate(LAYERS):
        offset = 2 * index * size
        shape = HEADS, TOKENS, DIM
        made.append(Plane(layer, "k", *shape, offset, (DIM, HEADS * DIM, 1)))
        made.append(Plane(layer, "v", *shape, offset + size, (1, HEADS, HEADS * TOKENS)))
    return KVLayout(tuple(made))


ARRANGEMENTS = {
    "token, head, K then V": planes.token_major(LAYERS, 1, TOKENS, HEADS, DIM),
    "head, token, K then V": planes.head_major(LAYERS, 1, TOKENS, HEADS, DIM),
    "pages of 8 tokens": planes.token_major(LAYERS, TOKENS // 8, 8, HEADS, DIM),
    "K transposed": planes.channel_major_keys(LAYERS, 1, TOKENS, HEADS, DIM),
    "packed for matrix tiles": planes.matrix_tiles(LAYERS, 1, TOKENS, HEADS, DIM),
    "mixed": mixed_axes(),
}


def rows(num_tokens: int, seed: int) -> np.ndarray:
    """float32 [token, channel]: directions of falling strength, channels with an offset."""
    channels = len(LAYERS) * 2 * HEADS * DIM
    basis = np.random.default_rng(0).normal(size=(channels, channels)).astype(np.float32)
    offsets = np.random.default_rng(1).normal(size=channels).astype(np.float32) * 3
    strengths = (0.9 ** np.arange(channels)).astype(np.float32)
    noise = np.random.default_rng(seed + 2).normal(size=(num_tokens, channels)).astype(np.float32)
    return noise * strengths @ basis + offsets


def chunk(kv: KVLayout, element: str = "bf16", seed: int = 0) -> bytes:
    """The bytes of a chunk in that arrangement."""
    elements = np.empty(kv.num_elements, DTYPES[element])
    scatter(from_float32(rows(TOKENS, seed), elements.dtype), elements, kv)
    return elements.tobytes()


def layout(kv: KVLayout, element: str = "bf16", position: int = 1) -> ChunkLayout:
    return ChunkLayout(element, HEADS * DIM, kv, position)  # type: ignore[arg-type]


@cache
def calibration(seed: int = 0) -> Calibration:
    """Bands of one layer each; no rotation for layer 3."""
    kv = next(iter(ARRANGEMENTS.values()))
    samples = rows(400, seed)
    made, coefficients = [], []
    for layer in LAYERS:
        sources = tuple(Source(layer, kind, head) for kind in ("k", "v") for head in range(HEADS))
        values = np.concatenate([samples[:, kv.columns[source]] for source in sources], axis=1)
        gradients = np.random.default_rng(seed).normal(size=values.shape).astype(np.float32)
        frequencies = np.array([] if layer else [1.0, 0.1, 0.01], np.float32)
        band, of_band = fit_band(sources, values, gradients, frequencies, np.arange(len(values)))
        made.append(band)
        coefficients.append(of_band)
    return Calibration(f"made up {seed}", tuple(made), tail_of(coefficients))
