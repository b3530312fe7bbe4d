"""Pages are where we say they are: written by vLLM's own operator, read through our planes."""

import numpy as np
import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

from mcp_vllm.codec.values import gather
from mcp_vllm.link.protocol import GroupLayout, PageLayout
from mcp_vllm.vllm_plugin.layout import _ARRANGEMENTS, cpu_arrangement

current_platform.import_kernels()  # those of this CPU

TOKENS, HEADS, DIM = 64, 2, 64


def tensors() -> torch.Tensor:
    """bf16 [K or V, token, head, channel], no two equal in all 16 bits."""
    patterns = torch.arange(2 * TOKENS * HEADS * DIM, dtype=torch.int32).to(torch.int16)
    return patterns.view(torch.bfloat16).reshape(2, TOKENS, HEADS, DIM)


def written_page(isa: str, keys: torch.Tensor, values: torch.Tensor) -> np.ndarray:
    """uint16 elements of the one block that holds these K and V."""
    cache = torch.zeros(1, HEADS, 2 * TOKENS, DIM, dtype=torch.bfloat16)
    halves = cache.chunk(2, dim=2)
    slots = torch.arange(TOKENS)
    torch.ops._C.cpu_attn_reshape_and_cache(keys, values, *halves, slots, isa, 1.0, 1.0, "auto")
    return cache.view(torch.int16).numpy().view(np.uint16).reshape(-1)


@pytest.mark.parametrize("isa", _ARRANGEMENTS)
def test_planes_read_back_what_the_cpu_backend_writes(isa):
    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has no matrix tiles")
    keys, values = tensors()
    pages = PageLayout(_ARRANGEMENTS[isa], (0,), 1, TOKENS, HEADS, DIM)
    kv = GroupLayout(((0, 4 * TOKENS * HEADS * DIM),), "bf16", DIM, pages).codec_layout.kv
    rows = gather(written_page(isa, keys, values), kv)
    expected = torch.cat([keys.reshape(TOKENS, -1), values.reshape(TOKENS, -1)], dim=1)
    assert (rows == expected.view(torch.int16).numpy().view(np.uint16)).all()


def test_bf16_is_packed_for_matrix_tiles_where_the_cpu_has_them():
    spec = FullAttentionSpec(block_size=128, num_kv_heads=1, head_size=256, dtype=torch.bfloat16)
    has_tiles = torch.cpu._is_amx_tile_supported()
    assert cpu_arrangement(spec) == ("matrix-tiles" if has_tiles else "channel-major-keys")
