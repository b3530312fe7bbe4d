"""Every compiled step of SmartCache, once: so that no later call waits for a compiler or a file."""

from __future__ import annotations

from mcp_vllm.store.smart_cache.policy import SmartCache


def load_kernels() -> None:
    """Load the steps from numba's cache, where the installation put them: a fifth of a second.

    What is not there is compiled and put there, which takes most of a minute.
    """
    cache: SmartCache[int] = SmartCache(1_000, 4, max_ghosts=8)
    for chain in ([1, 2, 3], [1, 2, 4], [1, 2, 3, 5, 6]):
        known = cache.access(chain)
        parent = chain[known - 1] if known else None
        cache.offer(chain[known:], [200] * len(chain[known:]), parent=parent)
        cache.access(chain, num_output_tokens=10, since_s=0.0)
    cache.set_quota("tenant", 100)
    cache.evict_of("tenant", 100)
    cache.evict(300)
    cache.insert(7, 100)
    cache.pin([7])
    cache.unpin([7])
    cache.resize(7, 200)
    cache.explain(7)
    cache.restore(cache.save())
    cache.remove(7)
