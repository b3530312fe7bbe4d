"""Compile what numba compiles, once, when installing: else the first commands and tests wait.

The codecs' kernels compile when they are imported, those of SmartCache when they are first called.
"""

from mcp_vllm.codec import near_lossless, transform  # noqa: F401
from mcp_vllm.store.smart_cache import load_kernels

if __name__ == "__main__":
    load_kernels()
