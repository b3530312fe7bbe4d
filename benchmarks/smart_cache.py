"""SmartCache's cost: CPU microseconds a step and bytes a block, at ten thousand to a million.

    python benchmarks/smart_cache.py [--blocks N ...]

A step is one block of a request: its use is learned from, it is offered, and what must leave is
chosen. The cache is full of one chain a session before anything is measured; then half of the
requests continue a session that is held and half begin one. Keys are 36 bytes, as vLLM's. Memory is
what the process grew by while the cache was made and filled until its ghosts are all there, without
the keys, which the owner has anyway: over the blocks held, and over all that it has a record of.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import random
import time

import psutil
from setting import one_line

from mcp_vllm.store.smart_cache import SmartCache
from mcp_vllm.store.smart_cache.policy import MIN_GHOSTS

CHAIN = 20
MEASURED_REQUESTS = 3000


def key(number: int) -> bytes:
    """A key such as vLLM's: a hash and a group index."""
    return hashlib.sha256(number.to_bytes(8, "little")).digest() + bytes(4)


class Load:
    """Sessions that begin and go on, against one cache."""

    def __init__(self, num_blocks: int) -> None:
        self._rng = random.Random(0)
        self._next = 0
        self._now_s = 0.0
        self._chains: list[list[bytes]] = []
        self.empty(num_blocks)

    def empty(self, num_blocks: int) -> None:
        """Begin with an empty cache."""
        self.cache: SmartCache[bytes] = SmartCache(
            num_blocks * 1024, num_blocks, clock=lambda: self._now_s
        )

    def fresh(self, count: int) -> list[bytes]:
        self._next += count
        return [key(number) for number in range(self._next - count, self._next)]

    def chain(self) -> list[bytes]:
        """The next request: a session that goes on, or a new one."""
        if self._chains and self._rng.random() < 0.5:
            place = self._rng.randrange(max(0, len(self._chains) - 2000), len(self._chains))
            self._chains[place] = self._chains[place][-3 * CHAIN :]
            self._chains[place] += self.fresh(2)
            return self._chains[place]
        self._chains.append(self.fresh(CHAIN))
        return self._chains[-1]

    def serve(self, chain: list[bytes], sizes: list[int]) -> None:
        self._now_s += 0.3
        self.cache.access(chain, num_output_tokens=200)
        self.cache.offer(chain, sizes)


def measure(num_blocks: int) -> dict[str, float]:
    """Steps of a full cache of so many blocks."""
    load = Load(num_blocks)
    load.serve(load.fresh(CHAIN), [1024] * CHAIN)  # compiles, or loads what was compiled
    num_records = num_blocks + max(MIN_GHOSTS, num_blocks)
    keys = [load.fresh(CHAIN) for _ in range(num_records // CHAIN + 1)]
    gc.collect()
    before = psutil.Process().memory_info().rss
    load.empty(num_blocks)
    sizes = [1024] * CHAIN
    for chain in keys:
        load.serve(chain, sizes)
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    records = len(load.cache) + load.cache.num_ghosts
    del keys
    requests = [load.chain()[:] for _ in range(MEASURED_REQUESTS)]
    times = []
    for chain in requests:
        sizes = [1024] * len(chain)
        start = time.process_time()
        load.serve(chain, sizes)
        times.append((time.process_time() - start) / len(chain) * 1e6)
    steps = sum(map(len, requests))
    mean = sum(spent * len(chain) for spent, chain in zip(times, requests, strict=True)) / steps
    times.sort()
    return {
        "blocks": num_blocks,
        "held": len(load.cache),
        "mean_us": mean,
        "p50_us": times[len(times) // 2],
        "p99_us": times[len(times) * 99 // 100],
        "bytes": grown / num_blocks,
        "record_bytes": grown / records,
        "ghosts": load.cache.num_ghosts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    print(one_line())
    print(
        f"{'blocks':>9} {'us/step':>8} {'p50':>7} {'p99':>7} {'bytes/held':>11} "
        f"{'bytes/record':>13} {'ghosts':>9}"
    )
    for num_blocks in parser.parse_args().blocks:
        m = measure(num_blocks)
        print(
            f"{num_blocks:>9} {m['mean_us']:>8.2f} {m['p50_us']:>7.2f} {m['p99_us']:>7.2f} "
            f"{m['bytes']:>11.0f} {m['record_bytes']:>13.0f} {m['ghosts']:>9}",
            flush=True,
        )


if __name__ == "__main__":
    main()
