"""A model's calibration: K and V of calibration texts, and the gradients of its own loss by them.

The loss is of tokens drawn from the model's own prediction, so that the mean outer product of the
gradients is the Fisher information, whatever the text says.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from mcp_vllm.codec import rotation
from mcp_vllm.codec.calibration import Calibration
from mcp_vllm.codec.fit import fit_band, tail_of
from mcp_vllm.codec.loss import NUM_EXACT_TOKENS
from mcp_vllm.codec.planes import Source
from mcp_vllm.quality.model import Model, UnusableModel, windows

WINDOW_TOKENS = 512
# Only some tokens of a window are predicted: the loss over a large vocabulary is most of the work.
_PREDICTED_TOKENS = 64
# Heads of a layer are decorrelated together up to so many channels of K and V: beyond, the
# multiplication would take longer than a thin link.
_MAX_CHANNELS = 1024


@dataclass(frozen=True)
class Layer:
    """Samples of one layer: float32 [sample, head, channel], K without its rotation; int64
    [sample], the position in its window.
    """

    keys: np.ndarray
    values: np.ndarray
    key_gradients: np.ndarray
    value_gradients: np.ndarray
    positions: np.ndarray
    frequencies: np.ndarray


def library_text(num_characters: int) -> str:
    """Text that comes with Python: its sources and its language reference, turn by turn.

    None of it is in benchmarks/texts.
    """
    from pydoc_data.topics import topics

    rng = random.Random(0)
    folder = Path(os.__file__).parent
    sources = sorted(folder.glob("*.py")) + sorted(folder.glob("json/*.py"))
    pieces: list[str] = []
    while sum(map(len, pieces)) < num_characters:
        source = rng.choice(sources).read_text(encoding="utf-8", errors="ignore")
        pieces.append(_cut(source, rng))
        pieces.append(_cut("\n".join(rng.sample(list(topics.values()), 3)), rng))
    return "\n\n".join(pieces)


def _cut(text: str, rng: random.Random) -> str:
    """Some 4000 characters of it."""
    start = rng.randrange(max(1, len(text) - 4000))
    return text[start : start + 4000]


def calibrate(
    model: Model, spans: Sequence[torch.Tensor], on_step: Callable[[int, int], None]
) -> Calibration:
    """Calibration from windows of int64 [token]; ``on_step`` hears how many of all are done.

    UnusableModel where the model keeps no K and V per layer.
    """
    bands, coefficients = [], []
    for index, layer in enumerate(layers_of_windows(model, spans, on_step)):
        for band, of_band in _fit_layer(index, layer):
            bands.append(band)
            coefficients.append(of_band)
    return Calibration(model.path.name, tuple(bands), tail_of(coefficients))


def windows_of_text(model: Model, text: str, num_windows: int) -> list[torch.Tensor]:
    """The first windows of a text, int64 [WINDOW_TOKENS - 1]; UnusableModel where it is short."""
    tokens = model.tokens_of(text)
    spans = list(windows(tokens, WINDOW_TOKENS - 1, WINDOW_TOKENS - 1))[:num_windows]
    if len(spans) < num_windows:
        raise UnusableModel(
            f"the text has {len(tokens)} tokens, {num_windows * WINDOW_TOKENS} are needed;"
            " give more text, or fewer --windows"
        )
    return spans


def layers_of_windows(
    model: Model, spans: Sequence[torch.Tensor], on_step: Callable[[int, int], None]
) -> list[Layer]:
    """Samples of each layer, all windows one after the other."""
    rng = torch.Generator().manual_seed(0)
    sampled = []
    for index, span in enumerate(spans):
        sampled.append(_sample(model, model.context(span), rng))
        on_step(index + 1, len(spans))
    return [_joined(of_layer) for of_layer in zip(*sampled, strict=True)]


class _GradientCache(DynamicCache):
    """Keeps K and V [1, head, token, channel] of each layer as they came, with their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kw: Any,
    ) -> Any:
        key_states.retain_grad()
        value_states.retain_grad()
        self.tensors[layer_idx] = key_states, value_states
        return super().update(key_states, value_states, layer_idx, *args, **kw)


def _sample(model: Model, context: torch.Tensor, rng: torch.Generator) -> list[Layer]:
    """One window of int64 [1, token]; layers in order."""
    # The weights have no gradients, so the chain has to begin at the input.
    embedded = model.network.get_input_embeddings()(context).detach().requires_grad_(True)
    num_tokens = context.shape[1]
    predicted = torch.randperm(num_tokens, generator=rng)[:_PREDICTED_TOKENS].sort().values
    cache = _GradientCache()
    with _Rotations(model.network) as rotations:
        output = model.network(
            inputs_embeds=embedded, past_key_values=cache, use_cache=True, logits_to_keep=predicted
        )
    logits = output.logits[0].float()
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=rng)[:, 0]
    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
    scale = (num_tokens / _PREDICTED_TOKENS) ** 0.5
    layers = []
    for index in sorted(cache.tensors):
        keys, values = cache.tensors[index]
        if keys.grad is None or values.grad is None:
            raise UnusableModel(f"layer {index} of the model does not read its K and V")
        frequencies = rotations.frequencies.get(index, np.empty(0, np.float32))
        layers.append(
            Layer(
                _unrotated(_rows(keys), frequencies),
                _rows(values),
                _unrotated(_rows(keys.grad * scale), frequencies),
                _rows(values.grad * scale),
                np.arange(NUM_EXACT_TOKENS, num_tokens),
                frequencies,
            )
        )
    return layers


class _Rotations:
    """Hears which rotary angles each attention layer is given, while it is entered."""

    def __init__(self, network: Any) -> None:
        self.frequencies: dict[int, np.ndarray] = {}
        self._network = network

    def __enter__(self) -> _Rotations:
        self._hooks = [
            module.register_forward_pre_hook(self._hear, with_kwargs=True)
            for module in self._network.modules()
            if hasattr(module, "layer_idx")
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hear(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (given := kwargs.get("position_embeddings")) is not None:
            # At position 1 the angle is the frequency; each occurs twice, in the halves of a head.
            cosines, sines = (each[0, 1, : each.shape[-1] // 2].double() for each in given)
            self.frequencies[module.layer_idx] = torch.atan2(sines, cosines).float().numpy()


def _rows(tensor: torch.Tensor) -> np.ndarray:
    """[1, head, token, channel] to float32 [token, head, channel], without the exact tokens."""
    return tensor.detach()[0].permute(1, 0, 2)[NUM_EXACT_TOKENS:].float().contiguous().numpy()


def _unrotated(rows: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    if len(frequencies):
        cosines, sines = rotation.angles(frequencies, NUM_EXACT_TOKENS, len(rows))
        for head in range(rows.shape[1]):
            rotation.rotate(rows[:, head], cosines, -sines)
    return rows


def _joined(windows_of_layer: Sequence[Layer]) -> Layer:
    """All windows of a layer, one after the other."""
    names = ("keys", "values", "key_gradients", "value_gradients", "positions")
    parts = [np.concatenate([getattr(each, name) for each in windows_of_layer]) for name in names]
    return Layer(*parts, windows_of_layer[0].frequencies)


def _fit_layer(index: int, layer: Layer) -> list[Any]:
    """Bands of so many heads of K and V as one may have."""
    num_heads = layer.keys.shape[1]
    of_head = layer.keys.shape[2] + layer.values.shape[2]
    heads_of_band = max(1, _MAX_CHANNELS // of_head)
    bands = []
    for first in range(0, num_heads, heads_of_band):
        heads = range(first, min(first + heads_of_band, num_heads))
        span = slice(heads.start, heads.stop)
        sources = tuple(Source(index, kind, head) for kind in ("k", "v") for head in heads)  # type: ignore[arg-type]
        bands.append(
            fit_band(
                sources,
                _flat(layer.keys[:, span], layer.values[:, span]),
                _flat(layer.key_gradients[:, span], layer.value_gradients[:, span]),
                layer.frequencies,
                layer.positions,
            )
        )
    return bands


def _flat(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[sample, channel] of [sample, head, channel] twice."""
    num_samples = len(keys)
    return np.concatenate([keys.reshape(num_samples, -1), values.reshape(num_samples, -1)], axis=1)
