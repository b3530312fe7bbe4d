"""A plan as a table, as JSON and as a picture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from mcp_vllm.split.plan.cost import Split
from mcp_vllm.split.plan.partitioner import Plan, PlanError
from mcp_vllm.split.plan.search import LOCAL_RESERVE, Candidate

_MIB = 1 << 20


def table(plan: Plan, rows: int) -> Table:
    """The quickest splits, everything local and everything remote; the best one is marked."""
    load, found = plan.load, plan.found
    made = Table(
        box=box.SIMPLE_HEAD,
        title=f"{plan.shape.name}: {load.prompt} + {load.answer} tokens, {load.batch} at once, "
        f"{plan.form} activations",
    )
    for name, justify in (
        ("", "left"),
        ("layers at\nthe stage", "left"),
        ("TTFT\nms", "right"),
        ("token\nms", "right"),
        ("request\ns", "right"),
        ("local\nMiB", "right"),
        ("stage\nMiB", "right"),
        ("fits", "left"),
    ):
        made.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    _add(made, plan, found.local, "nothing")
    _add(made, plan, found.remote, f"{_layers(found.remote.split)} (all)")
    made.add_section()
    for each in found.splits[:rows]:
        _add(made, plan, each, _layers(each.split))
    return made


def verdict(plan: Plan) -> str:
    """One or two sentences: what is best, whether splitting pays, what is short."""
    found = plan.found
    best, split = found.best, found.best_split
    if best is None:
        return (
            "Nothing fits: neither everything local nor any split. "
            f"Usable here are {plan.limits.usable_local_bytes // _MIB} MiB "
            f"({LOCAL_RESERVE:.0%} is kept free), at the stage {plan.limits.stage_bytes // _MIB} "
            "MiB; --batch, --prompt and --answer say how much KV is needed."
        )
    if found.pays:
        assert best.split is not None
        gain = (
            f"{found.local.request_s / best.request_s:.2f} times as quick as everything local"
            if found.local.fits
            else "everything local does not fit"
        )
        return f"Best: layers {_layers(best.split)} at the stage; {gain}."
    if split is None:
        return "Best: everything local; no split fits."
    return (
        f"Splitting does not pay: everything local takes {best.request_s:.2f} s a request, "
        f"the best split ({_layers(split.split)}) {split.request_s:.2f} s."
    )


def budget_line(plan: Plan, max_step_ms: float) -> str:
    """Which token budget keeps the steps of the best way to run below so long."""
    best = plan.found.best
    split = None if best is None else best.split
    tokens = plan.costs.budget_within(plan.load, split, max_step_ms / 1e3)
    if tokens is None:
        return f"--max-step-ms {max_step_ms:g}: not even steps of 16 tokens are as short as that."
    return f"Steps under {max_step_ms:g} ms: --max-num-batched-tokens {tokens}."


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything predicted, and the fits behind it."""
    found = plan.found
    return {
        "version": 1,
        "model": plan.model,
        "load": asdict(plan.load),
        "form": plan.form,
        "notes": list(plan.notes),
        "limits": asdict(plan.limits),
        "fits": {
            "local": asdict(plan.local),
            "cloud": asdict(plan.cloud),
            "link": asdict(plan.link),
        },
        "pays": found.pays,
        "best": None if found.best is None else _candidate(found.best),
        "everything_local": _candidate(found.local),
        "everything_remote": _candidate(found.remote),
        "splits": [_candidate(each) for each in found.splits],
    }


def picture(plan: Plan, path: Path) -> None:
    """Request time over all splits: first layer across, end upwards; what does not fit is pale.

    Raises PlanError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlanError("--picture needs matplotlib: pip install 'mcp-vllm[plan]'") from error
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.add_subplot()
    splits = [each for each in plan.found.splits if each.split is not None]
    points = axes.scatter(
        [each.split[0] for each in splits if each.split],
        [each.split[1] for each in splits if each.split],
        c=[each.request_s for each in splits],
        alpha=np.array([1.0 if each.fits else 0.25 for each in splits]),  # type: ignore[arg-type]
        cmap="viridis_r",
        marker="s",
    )
    figure.colorbar(points, label="predicted seconds a request")
    best = plan.found.best_split
    if best is not None and best.split is not None:
        axes.scatter(*best.split, marker="*", s=260, facecolor="none", edgecolor="red")
        axes.annotate(f"best split {_layers(best.split)}", best.split, (6, -14),
                      textcoords="offset points", color="red")  # fmt: skip
    axes.set_xlabel("first layer at the stage")
    axes.set_ylabel("first local layer after it")
    axes.set_title(f"{plan.shape.name}; everything local: {plan.found.local.request_s:.2f} s"
                   f"{'' if plan.found.local.fits else ' (does not fit)'}")  # fmt: skip
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise PlanError(f"--picture {path}: {error}") from error


def _add(made: Table, plan: Plan, each: Candidate, name: str) -> None:
    is_best = each == plan.found.best
    made.add_row(
        "best" if is_best else "",
        name,
        f"{each.ttft_s * 1e3:.1f}",
        f"{each.token_s * 1e3:.2f}",
        f"{each.request_s:.2f}",
        f"{each.local_bytes / _MIB:.0f}",
        f"{each.stage_bytes / _MIB:.0f}",
        _shortage(plan, each),
        style="bold green" if is_best else None,
    )


def _shortage(plan: Plan, each: Candidate) -> str:
    if each.fits:
        return "yes"
    if each.local_bytes > plan.limits.usable_local_bytes:
        return "not local"
    return "not stage"


def _candidate(each: Candidate) -> dict[str, Any]:
    return asdict(each) | {"split": None if each.split is None else _layers(each.split)}


def _layers(split: Split | None) -> str:
    return "none" if split is None else f"{split[0]}:{split[1]}"
