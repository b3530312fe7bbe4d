"""The measurement of `mcp-vllm bench quality`: every codec on every segment of every text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from mcp_vllm.codec import Codec, get_codec, needs_calibration
from mcp_vllm.codec.calibration import Calibration
from mcp_vllm.errors import McpError
from mcp_vllm.quality.model import Model, prefill, windows
from mcp_vllm.quality.restore import restore
from mcp_vllm.quality.score import Score, refer, score


@dataclass(frozen=True)
class Setting:
    """Lengths in tokens. Segments of a text overlap in their prefix, never in what is scored."""

    prefix: int = 512
    continuation: int = 129
    block: int = 16
    most_segments: int = 6
    greedy: int = 32


@dataclass(frozen=True)
class Contestant:
    """A codec as the user named it: ``NAME`` or ``NAME:STEP``."""

    label: str
    codec: Codec
    step: float | None

    @classmethod
    def parse(cls, label: str, calibration: Calibration | None) -> Contestant:
        name, _, text = label.partition(":")
        try:
            step = float(text) if text else None
        except ValueError:
            raise McpError(
                f"codec {label!r}: {text!r} is no step; write NAME or NAME:0.01"
            ) from None
        used = calibration if needs_calibration(name) else None
        return cls(label, get_codec(name, calibration=used, step=step), step)


@dataclass(frozen=True)
class Measured:
    """One codec on one segment."""

    text: str
    score: Score
    raw_bytes: int
    frame_bytes: int
    later_raw_bytes: int
    later_frame_bytes: int


def segments_of(model: Model, text: str, setting: Setting) -> Iterator[torch.Tensor]:
    """int64 [1, token]: prefix, then what is scored."""
    tokens = model.tokens_of(text)
    length = len(model.context(tokens[:0])[0])
    whole = setting.prefix + setting.continuation
    # The last token of a continuation is the first of the next: it is scored once, read once.
    spans = windows(tokens, whole - length, setting.continuation - 1)
    for _, span in zip(range(setting.most_segments), spans, strict=False):
        yield model.context(span)


def run(
    model: Model,
    texts: dict[str, str],
    contestants: Sequence[Contestant],
    calibration: Calibration | None,
    setting: Setting,
    on_step: Callable[[int, int], None],
) -> dict[str, list[Measured]]:
    """Measurements by label. ``on_step`` hears how many of how many steps are done."""
    segments = [
        (name, number, segment)
        for name, text in texts.items()
        for number, segment in enumerate(segments_of(model, text, setting))
    ]
    if missing := set(texts) - {name for name, _, _ in segments}:
        raise McpError(
            f"{', '.join(sorted(missing))}: shorter than {setting.prefix + setting.continuation}"
            " tokens; give a longer text, or a shorter --prefix"
        )
    measured: dict[str, list[Measured]] = {each.label: [] for each in contestants}
    total = len(segments) * (1 + len(contestants))
    for index, (name, number, segment) in enumerate(segments):
        tensors = prefill(model, segment[:, : setting.prefix])
        # Both sides start from bf16, as the engine keeps it.
        tensors = [(k.bfloat16().float(), v.bfloat16().float()) for k, v in tensors]
        continuation = segment[:, setting.prefix :]
        # Answers are slow, so only the first segment of a text gets one.
        num_greedy = setting.greedy if number == 0 else 0
        reference = refer(model, tensors, continuation, num_greedy)
        on_step(index * (1 + len(contestants)) + 1, total)
        for position, each in enumerate(contestants):
            restored = restore(tensors, setting.block, each.codec, calibration)
            measured[each.label].append(
                Measured(
                    name,
                    score(model, restored.tensors, continuation, reference),
                    restored.num_raw_bytes,
                    restored.num_frame_bytes,
                    restored.num_raw_bytes - restored.num_first_raw_bytes,
                    restored.num_frame_bytes - restored.num_first_frame_bytes,
                )
            )
            on_step(index * (1 + len(contestants)) + 2 + position, total)
    return measured


def summarize(measured: Sequence[Measured]) -> dict[str, Any]:
    """Means over segments; ``dppl_se_percent`` is the standard error over them.

    ``ratio`` is of whole frames without the first chunk of the context: what long contexts tend to.
    ``ratio_of_prefix`` includes it, with its exact tokens.
    """
    deltas = [each.score.delta_nll for each in measured]
    matches = [m.score.greedy_match for m in measured if m.score.greedy_match is not None]
    later = sum(m.later_raw_bytes for m in measured), sum(m.later_frame_bytes for m in measured)
    whole = sum(m.raw_bytes for m in measured), sum(m.frame_bytes for m in measured)
    ratio = (later[0] / later[1]) if later[1] else whole[0] / whole[1]
    return {
        "ratio": round(ratio, 3),
        "ratio_of_prefix": round(whole[0] / whole[1], 3),
        "bits_per_value": round(16 / ratio, 3),
        "frame_bytes": whole[1],
        "dppl_percent": round(100 * math.expm1(fmean(deltas)), 3),
        "dppl_se_percent": (
            round(100 * stdev(deltas) / math.sqrt(len(deltas)), 3) if len(deltas) > 1 else None
        ),
        "kl": round(fmean(m.score.kl for m in measured), 5),
        "top1_percent": round(100 * fmean(m.score.top1 for m in measured), 2),
        "greedy_match": round(fmean(matches), 1) if matches else None,
        "segments": len(measured),
    }


def by_text(measured: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """The same for each text alone."""
    names = dict.fromkeys(each.text for each in measured)
    return {name: summarize([m for m in measured if m.text == name]) for name in names}
