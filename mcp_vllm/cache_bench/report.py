"""The replay's scores as a table, as JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from mcp_vllm.cache_bench.replay import BELADY, SMART_CACHE, Score
from mcp_vllm.cache_bench.trace import Trace
from mcp_vllm.errors import McpError


def table(scores: Sequence[Score], trace: Trace) -> Table:
    """One line a capacity and policy."""
    made = Table(
        title=f"{len(trace.requests)} requests, {trace.num_accesses} blocks, "
        f"{trace.num_blocks} distinct, {trace.block_tokens} tokens each"
    )
    for name in ("capacity", "policy", "hit rate", "byte hit rate", "prefill saved s", "spent s"):
        made.add_column(name, justify="left" if name == "policy" else "right")
    shown = None
    for score in scores:
        share = f"{score.capacity} ({score.capacity / trace.num_blocks:.1%})"
        if shown is not None and score.capacity != shown:
            made.add_section()
        made.add_row(
            share if score.capacity != shown else "",
            score.policy,
            f"{score.hit_rate:.4f}",
            f"{score.byte_hit_rate:.4f}",
            f"{score.saved_prefill_s:.0f}",
            f"{score.spent_s:.1f}",
        )
        shown = score.capacity
    return made


def as_json(scores: Sequence[Score], trace: Trace) -> dict[str, Any]:
    """All figures, and for each capacity what share of the way to the optimum is closed."""
    return {
        "requests": len(trace.requests),
        "blocks": trace.num_accesses,
        "distinct_blocks": trace.num_blocks,
        "block_tokens": trace.block_tokens,
        "scores": [asdict(score) for score in scores],
        "closed": closed(scores),
    }


def closed(scores: Sequence[Score]) -> dict[int, float]:
    """For each capacity: SmartCache's lead over the best classic, over Belady's lead over it."""
    shares: dict[int, float] = {}
    for capacity in dict.fromkeys(score.capacity for score in scores):
        rates = {score.policy: score.hit_rate for score in scores if score.capacity == capacity}
        classics = [
            rate
            for name, rate in rates.items()
            if name != BELADY and not name.startswith(SMART_CACHE)
        ]
        if SMART_CACHE in rates and BELADY in rates and rates[BELADY] > max(classics):
            lead = rates[BELADY] - max(classics)
            shares[capacity] = (rates[SMART_CACHE] - max(classics)) / lead
    return shares


def draw(scores: Sequence[Score], trace: Trace, path: Path) -> None:
    """Hit rate over capacity, one line a policy.

    Raises:
        McpError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise McpError("drawing needs matplotlib: pip install 'mcp-vllm[bench]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(score.policy for score in scores):
        line = [(s.capacity / trace.num_blocks, s.hit_rate) for s in scores if s.policy == name]
        line.sort()
        width = 2.5 if name == SMART_CACHE else 1.2
        dashes = "--" if name == BELADY else "-"
        axes.plot(
            *zip(*line, strict=True), dashes, marker="o", markersize=3, label=name, linewidth=width
        )
    axes.set_xscale("log")
    axes.set_xlabel("capacity, share of distinct blocks")
    axes.set_ylabel("block hit rate, prefix rule")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise McpError(f"cannot write {path}: {error.strerror}") from error
