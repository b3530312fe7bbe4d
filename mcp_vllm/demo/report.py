"""What the demo shows: a table, one picture, demo.json, and a last line in words."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mcp_vllm.demo.run import DemoResult

MIB = 1 << 20


def show(result: DemoResult, output: Path) -> bool:
    """Print the result and write it to `output`; True when it is a success."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "demo.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    _draw(result, output / "demo.png")
    console = Console()
    console.print(_table(result))
    console.print(f"B's answer to turn 4: {result.answer.strip()!r}")
    if result.fault:
        console.print(f"[bold red]FAILED: {result.fault}[/]; the logs are in {output / 'logs'}")
    else:
        console.print(_verdict(result))
    console.print(f"written: {output / 'demo.json'}, {output / 'demo.png'}")
    return not result.fault


def _table(result: DemoResult) -> Table:
    table = Table(title=f"A chat of four turns, {result.model}")
    for name in ("turn", "engine"):
        table.add_column(name)
    for name in ("prompt tokens", "imported", "first token ms", "raw MiB", "wire MiB"):
        table.add_column(name, justify="right")
    for row in result.turns:
        table.add_row(
            str(row.turn),
            row.engine,
            str(row.prompt_tokens),
            str(row.imported_tokens),
            f"{row.ttft_ms:.0f}",
            f"{row.raw_bytes / MIB:.1f}",
            f"{row.wire_bytes / MIB:.1f}",
        )
    return table


def _verdict(result: DemoResult) -> str:
    times = result.ttft_ms
    return (
        f"The session moved from A to B with the same tokens as on A: first token after "
        f"{times['import']:.0f} ms instead of {times['recompute']:.0f} ms "
        f"({times['import'] / times['recompute']:.2f} of recompute), and after a restart of B in "
        f"{times['restart']:.0f} ms."
    )


def _draw(result: DemoResult, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = ["recompute", "import", "restart"]
    bars = left.bar(names, [result.ttft_ms[name] for name in names], color=["0.6", "C0", "C2"])
    left.bar_label(bars, fmt="%.0f ms")
    left.set_ylabel("time to first token, turn 4 (ms)")
    moved = next(row for row in result.turns if row.engine == "B")
    sizes = [moved.raw_bytes / MIB, moved.wire_bytes / MIB]
    bars = right.bar(["KV as the engine holds it", "on the wire"], sizes, color=["0.6", "C0"])
    right.bar_label(bars, fmt="%.1f MiB")
    right.set_ylabel("moved for turn 4 (MiB)")
    figure.suptitle(f"A chat moves from engine A to engine B ({result.model})")
    figure.savefig(path, dpi=120)
    plt.close(figure)
