"""A measurement of quality as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from mcp_vllm.codec.calibration import Calibration
from mcp_vllm.quality.run import Contestant, Measured, Setting, by_text, summarize

_COLUMNS = (
    "codec",
    "ratio",
    "of prefix",
    "frame bytes",
    "ppl change",
    "KL",
    "same top-1",
    "greedy",
)


def as_json(
    measured: Mapping[str, Sequence[Measured]],
    contestants: Sequence[Contestant],
    calibration: Calibration | None,
    setting: Setting,
    model: str,
) -> dict[str, Any]:
    """Everything that was measured; `benchmarks/codec.py --quality` reads ``codecs``."""
    return {
        "model": model,
        "calibration": calibration and calibration.fingerprint.hex(),
        "setting": asdict(setting),
        "codecs": [
            {
                "name": each.label,
                "codec": each.codec.name,
                "step": each.step,
                "lossless": each.codec.lossless,
                **summarize(measured[each.label]),
                "texts": by_text(measured[each.label]),
            }
            for each in contestants
        ],
    }


def table(report: Mapping[str, Any]) -> Table:
    """One line a codec, then one a text of it."""
    setting = report["setting"]
    made = Table(
        caption=f"{report['model']}: prefix of {setting['prefix']} tokens in chunks of"
        f" {setting['block']}, then {setting['continuation'] - 1} scored"
    )
    for column in _COLUMNS:
        made.add_column(column, justify="left" if column == "codec" else "right")
    for codec in report["codecs"]:
        made.add_row(codec["name"], *_cells(codec), style="bold")
        for name, of_text in codec["texts"].items():
            made.add_row(f"  {name} ({of_text['segments']})", *_cells(of_text), style="dim")
    return made


def _cells(line: Mapping[str, Any]) -> list[str]:
    error = line["dppl_se_percent"]
    return [
        f"{line['ratio']:.2f}",
        f"{line['ratio_of_prefix']:.2f}",
        str(line["frame_bytes"]),
        f"{line['dppl_percent']:+.2f} %" + (f" ± {error:.2f}" if error is not None else ""),
        f"{line['kl']:.4f}",
        f"{line['top1_percent']:.1f} %",
        "" if line["greedy_match"] is None else f"{line['greedy_match']:g}",
    ]
