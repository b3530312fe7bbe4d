"""Compile what numba compiles, once, when installing: else the first commands and tests wait.

The codecs' kernels compile when they are imported, those of SmartCache when they are first called.
"""

from mcp_vllm.codec import near_lossless, transform  # noqa: F401
from mcp_vllm.store.smart_cache import SmartCache


def main() -> None:
    cache: SmartCache[int] = SmartCache(1_000, 4, max_ghosts=8)
    for chain in ([1, 2, 3], [1, 2, 4], [1, 2, 3, 5, 6]):
        known = cache.access(chain)
        parent = chain[known - 1] if known else None
        cache.offer(chain[known:], [200] * len(chain[known:]), parent=parent)
        cache.access(chain, num_output_tokens=10, since_s=0.0)
    cache.evict(300)
    cache.insert(7, 100)
    cache.pin([7])
    cache.unpin([7])
    cache.resize(7, 200)
    cache.explain(7)
    cache.restore(cache.save())
    cache.remove(7)


if __name__ == "__main__":
    main()
