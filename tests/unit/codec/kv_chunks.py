"""Chunks that stress a float codec."""

import numpy as np
from hypothesis import strategies as st

from mcp_vllm.codec.layout import ELEMENTS, ChunkLayout


def bf16_kv(num_tokens: int, channels: int, seed: int = 0) -> bytes:
    """bf16 [token, channel] gaussians, each channel with its own scale and offset."""
    rng = np.random.default_rng(seed)
    scale = np.exp2(rng.normal(0, 1.5, channels)).astype(np.float32)
    values = rng.normal(0, 1, (num_tokens, channels)).astype(np.float32) * scale
    values += rng.normal(0, 1, channels).astype(np.float32) * scale
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


layouts = st.builds(
    ChunkLayout,
    st.sampled_from(ELEMENTS),
    st.sampled_from([1, 2, 3, 8, 64, 80, 256, 1000, 2**20, 2**32 - 1]),
)


@st.composite
def _gaussian(draw: st.DrawFn) -> bytes:
    raw = bf16_kv(
        draw(st.integers(1, 70)), draw(st.sampled_from([1, 8, 64, 80])), draw(st.integers(0, 9))
    )
    return raw[: len(raw) - draw(st.integers(0, 3))]


@st.composite
def _special_values(draw: st.DrawFn) -> bytes:
    """Runs of -0.0, infinities, NaN payloads, subnormals and a constant."""
    specials = [0x8000, 0x0000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x0001, 0x3F80]
    pool = draw(st.lists(st.sampled_from(specials), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    return rng.choice(np.array(pool, np.uint16), draw(st.integers(0, 5000))).tobytes()


@st.composite
def _noise(draw: st.DrawFn) -> bytes:
    return np.random.default_rng(draw(st.integers(0, 9))).bytes(draw(st.integers(0, 20_000)))


chunks = st.one_of(st.binary(max_size=65), _gaussian(), _special_values(), _noise())
