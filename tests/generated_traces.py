"""Request traces made for the tests of eviction policies: chats, and what is hard for a cache."""

from __future__ import annotations

import heapq
import itertools
import random

from mcp_vllm.cache_bench.trace import Request, Trace

BLOCK_TOKENS = 512


def trace_of(chains: list[tuple[float, list[int]]]) -> Trace:
    """A trace of (time in seconds, blocks) pairs."""
    numbers: dict[int, int] = {}
    requests = [
        Request(
            time_s,
            tuple(numbers.setdefault(block, len(numbers)) for block in chain),
            len(chain) * BLOCK_TOKENS,
            200,
        )
        for time_s, chain in sorted(chains, key=lambda each: each[0])
    ]
    accesses = sum(len(request.blocks) for request in requests)
    return Trace(requests, len(numbers), accesses, BLOCK_TOKENS)


def chats(num_sessions: int = 600, seed: int = 0) -> Trace:
    """Chats over one system prompt: most end after a turn, some go on, with pauses of minutes."""
    rng = random.Random(seed)
    fresh = itertools.count(1)
    chains: list[tuple[float, list[int]]] = []
    pending: list[tuple[float, int, list[int]]] = []
    for session in range(num_sessions):
        first = [0, *(next(fresh) for _ in range(rng.choice([2, 4, 8, 16, 40])))]
        heapq.heappush(pending, (rng.uniform(0, 3 * num_sessions), session, first))
    while pending:
        time_s, session, chain = heapq.heappop(pending)
        chains.append((time_s, chain))
        if rng.random() < (0.3 if len(chain) > 30 else 0.6):
            longer = [*chain[:-1], *(next(fresh) for _ in range(rng.randint(2, 4)))]
            later = time_s + rng.lognormvariate(4.6, 0.8)
            heapq.heappush(pending, (later, session, longer))
    return trace_of(chains)


def scan(num_requests: int = 3000, seed: int = 0) -> Trace:
    """A few popular documents, asked about again and again among one-time prompts."""
    rng = random.Random(seed)
    fresh = itertools.count(100_000)
    documents = [[i * 100 + j for j in range(10)] for i in range(30)]
    chains = []
    for i in range(num_requests):
        once = rng.random() < 0.8
        chain = [next(fresh) for _ in range(10)] if once else rng.choice(documents)
        chains.append((float(i), chain))
    return trace_of(chains)


def loop(capacity: int, num_rounds: int = 40) -> Trace:
    """Documents asked about in turn, together a tenth more than the cache."""
    documents = [[i * 100 + j for j in range(10)] for i in range(int(capacity * 1.1) // 10)]
    asked = itertools.chain.from_iterable(itertools.repeat(documents, num_rounds))
    return trace_of([(float(i), chain) for i, chain in enumerate(asked)])


def shift(num_requests: int = 6000, seed: int = 0) -> Trace:
    """Popular documents, all replaced by others half-way."""
    rng = random.Random(seed)
    chains = []
    for i in range(num_requests):
        rank = min(int(rng.paretovariate(0.9)), 400)
        half = 0 if i < num_requests // 2 else 1
        chains.append((float(i), [(half * 1000 + rank) * 100 + j for j in range(5)]))
    return trace_of(chains)


def flood(num_requests: int = 4000, seed: int = 0) -> Trace:
    """Chats of many, while one client sends one-time prompts, nine requests of ten."""
    rng = random.Random(seed)
    fresh = itertools.count(10_000_000)
    calm = list(chats(num_requests // 20, seed).requests)
    chains = [(request.time_s, list(request.blocks)) for request in calm]
    end = calm[-1].time_s
    for _ in range(9 * len(calm)):
        chains.append((rng.uniform(0, end), [next(fresh) for _ in range(10)]))
    return trace_of(chains)


def popular(num_documents: int = 2000, num_requests: int = 4000, seed: int = 0) -> Trace:
    """Documents of steady popularity, by Zipf's law, independently asked about."""
    rng = random.Random(seed)
    weights = [(rank + 1) ** -0.8 for rank in range(num_documents)]
    asked = rng.choices(range(num_documents), weights, k=num_requests)
    return trace_of([(i / 3, [each * 100 + j for j in range(8)]) for i, each in enumerate(asked)])


def agents(num_tasks: int = 1200, seed: int = 0) -> Trace:
    """Agents over shared system prompts, in bursts: some call once, some loop within seconds."""
    rng = random.Random(seed)
    fresh = itertools.count(1_000_000)
    prompts = [[app * 1000 + j for j in range(rng.choice([3, 6, 10, 14]))] for app in range(40)]
    pending: list[tuple[float, int, float, list[int]]] = []
    time_s = 0.0
    for task in range(num_tasks):
        time_s += rng.expovariate(1.3) * (0.2 if rng.random() < 0.5 else 1.0)
        app = min(int(rng.paretovariate(0.7)), len(prompts)) - 1
        first = [*prompts[app], *(next(fresh) for _ in range(rng.choice([1, 1, 2, 5, 10])))]
        heapq.heappush(pending, (time_s, task, (0.1, 0.5, 0.7)[app % 3], first))
    chains: list[tuple[float, list[int]]] = []
    while pending:
        time_s, task, goes_on, chain = heapq.heappop(pending)
        chains.append((time_s, chain))
        if rng.random() < goes_on:
            longer = [*chain[:-1], *(next(fresh) for _ in range(rng.randint(1, 3)))]
            heapq.heappush(pending, (time_s + rng.lognormvariate(2, 1), task, goes_on, longer))
    return trace_of(chains)


def calls(num_requests: int = 2500, seed: int = 0) -> Trace:
    """Calls of one turn: a popular template, then what was never sent before."""
    rng = random.Random(seed)
    fresh = itertools.count(10_000_000)
    templates = [[each * 1000 + j for j in range(5)] for each in range(100)]
    chains = []
    for i in range(num_requests):
        template = templates[min(int(rng.paretovariate(0.6)), 100) - 1]
        chain = [*template, *(next(fresh) for _ in range(rng.choice([1, 4, 12])))]
        chains.append((i * 0.4, chain))
    return trace_of(chains)


def templates(num_requests: int = 6000, seed: int = 0) -> Trace:
    """A service's long prompt templates, of steady popularity, each now and then replaced by a new
    one; what follows a template was never sent before."""
    rng = random.Random(seed)
    fresh = itertools.count(10_000_000)
    numbers = itertools.count(1)

    def new_template() -> list[int]:
        start = next(numbers) * 1000
        return [start + j for j in range(rng.choice([5, 10, 20, 40, 60]))]

    offered = [new_template() for _ in range(300)]
    weights = [(rank + 1) ** -0.9 for rank in range(len(offered))]
    chains = []
    for i in range(num_requests):
        if rng.random() < 0.005:
            offered[rng.randrange(len(offered))] = new_template()
        template = rng.choices(offered, weights)[0]
        chains.append((i / 5, [*template, *(next(fresh) for _ in range(rng.choice([2, 5, 10])))]))
    return trace_of(chains)
