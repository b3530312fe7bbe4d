"""What noise on a split's activations costs in quality: perplexity for several epsilons.

    python benchmarks/split_noise.py [--model PATH] [--layers 4:14] [--tokens 1000] [--json F]

The rows that would be sent to a stage, the hidden states before the span, go through
`ActivationNoise.apply` in the whole model, in float32: what a stage computes from them is the same.
Norms are clipped at a percentile of those of the text itself. Epsilon is of one row at delta 1e-5;
beside it stands that of a session of 100 rows.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from setting import describe, one_line

from mcp_vllm.config.split import parse_layers
from mcp_vllm.demo.weights import ensure_gemma
from mcp_vllm.quality.model import Model
from mcp_vllm.split.noise import ActivationNoise

WINDOW = 256
EPSILONS = (10.0, 1e3, 1e4, 1e5, 1e6)
PERCENTILES = (50, 100)
SESSION_ROWS = 100
Change = Callable[[torch.Tensor], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: Gemma-3-270m")
    parser.add_argument("--layers", default="4:14")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = Model.load(Path(args.model) if args.model else ensure_gemma())
    first, _ = parse_layers(args.layers)
    texts = sorted((Path(__file__).parent / "texts").glob("*.txt"))
    each = args.tokens // len(texts)
    windows = [
        model.context(part)
        for path in texts
        for part in model.tokens_of(path.read_text(encoding="utf-8"))[:each].split(WINDOW)
        if len(part) > 1
    ]
    norms = row_norms(model, first, windows)
    results = [
        {"clip_norm": None, "epsilon": None, "perplexity": perplexity(model, first, windows)}
    ]
    for percentile in PERCENTILES:
        clip_norm = float(torch.quantile(norms, percentile / 100))
        for epsilon in (None, *EPSILONS):
            change, session = clip_only(clip_norm), None
            if epsilon is not None:
                noise = ActivationNoise(clip_norm, epsilon)
                change, session = noise.apply, noise.epsilon(SESSION_ROWS)
            results.append(
                {
                    "percentile": percentile,
                    "clip_norm": clip_norm,
                    "epsilon": epsilon,
                    "session_epsilon": session,
                    "perplexity": perplexity(model, first, windows, change),
                }
            )
    show(results, norms, sum(window.shape[1] - 1 for window in windows))
    if args.json:
        args.json.write_text(json.dumps({"setting": describe(), "results": results}, indent=1))


def clip_only(clip_norm: float) -> Change:
    return lambda rows: rows * (clip_norm / rows.norm(dim=-1, keepdim=True)).clamp(max=1.0)


@torch.inference_mode()
def row_norms(model: Model, first: int, windows: list[torch.Tensor]) -> torch.Tensor:
    norms: list[torch.Tensor] = []

    def note(rows: torch.Tensor) -> torch.Tensor:
        norms.append(rows.norm(dim=-1))
        return rows

    perplexity(model, first, windows, note)
    return torch.cat(norms)


@torch.inference_mode()
def perplexity(
    model: Model, first: int, windows: list[torch.Tensor], change: Change | None = None
) -> float:
    """Of all tokens but <bos>, with the rows before layer `first` changed."""

    def before(_: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0]
        return (change(hidden[0])[None].to(hidden.dtype), *args[1:]) if change else args

    handle = model.network.model.layers[first].register_forward_pre_hook(before)
    loss, count = 0.0, 0
    try:
        for window in windows:
            logits = model.network(window, use_cache=False).logits[0, :-1]
            loss += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
            count += window.shape[1] - 1
    finally:
        handle.remove()
    return math.exp(loss / count)


def show(results: list[dict], norms: torch.Tensor, num_tokens: int) -> None:
    shown = [f"{float(torch.quantile(norms, each)):.0f}" for each in (0.01, 0.5, 0.99, 1.0)]
    console = Console()
    console.print(f"{num_tokens} tokens; {one_line()}")
    console.print(f"norms of rows at 1, 50, 99 and 100 %: {', '.join(shown)}")
    table = Table("norm clipped at", "epsilon a row", f"of {SESSION_ROWS} rows", "perplexity")
    for each in results:
        clip = "none" if each["clip_norm"] is None else f"{each['clip_norm']:.0f}"
        if each["clip_norm"] is not None:
            clip += f" ({each['percentile']} %)"
        epsilon, session = each["epsilon"], each.get("session_epsilon")
        table.add_row(
            clip,
            "no noise" if epsilon is None else f"{epsilon:g}",
            "" if session is None else f"{session:.3g}",
            f"{each['perplexity']:.4g}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
