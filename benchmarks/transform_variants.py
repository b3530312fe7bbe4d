"""What each part of the lossy tiers' transform is worth, on a model of your own.

    python benchmarks/transform_variants.py MODEL_FOLDER [--windows 6] [--every 3]

Bands are fitted on two thirds of the windows of Python's own text and judged on the rest. *Harm* is
the mean square of an error's product with the gradient, summed over the layers: what it does to the
loss of a token, to the first order. Ratio is by the entropy of the integers in classes of similar
size, without frames. Ratios at equal harm are interpolated between steps.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mcp_vllm.codec import rotation
from mcp_vllm.codec.fit import fit_band
from mcp_vllm.codec.loss import NUM_EXACT_TOKENS
from mcp_vllm.codec.planes import Source
from mcp_vllm.codec.transform import to_coefficients, to_values
from mcp_vllm.quality.calibrate import (
    WINDOW_TOKENS,
    Layer,
    layers_of_windows,
    library_text,
    windows_of_text,
)
from mcp_vllm.quality.model import Model

STEPS = (0.0025, 0.005, 0.01, 0.02, 0.04)
HARMS = (0.003, 0.01, 0.03)
NO_FREQUENCIES = np.empty(0, np.float32)


@dataclass(frozen=True)
class Variant:
    name: str
    joint: bool = True
    unrotated: bool = True
    weights: str = "full"


VARIANTS = (
    Variant("as shipped: K and V together, K unrotated, full Fisher matrix"),
    Variant("K and V apart", joint=False),
    Variant("K as stored, rotated", unrotated=False),
    Variant("Fisher diagonal only", weights="diagonal"),
    Variant("no Fisher weights", weights="none"),
    Variant("K and V apart, rotated, diagonal", joint=False, unrotated=False, weights="diagonal"),
)


def rotated(rows: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """[window * token, head, channel], turned again as the model keeps K."""
    length = WINDOW_TOKENS - NUM_EXACT_TOKENS
    cosines, sines = rotation.angles(frequencies, NUM_EXACT_TOKENS, length)
    turned = rows.copy()
    for start in range(0, len(rows), length):
        for head in range(rows.shape[1]):
            rotation.rotate(turned[start : start + length, head], cosines, sines)
    return turned


def parts_of(layer: Layer, variant: Variant) -> list[tuple[np.ndarray, np.ndarray]]:
    """Values and gradients [sample, channel] of each band of a layer."""
    keys, gradients = layer.keys, layer.key_gradients
    if not variant.unrotated and len(layer.frequencies):
        keys, gradients = (rotated(each, layer.frequencies) for each in (keys, gradients))
    flat = [
        (values.reshape(len(values), -1), slopes.reshape(len(slopes), -1))
        for values, slopes in ((keys, gradients), (layer.values, layer.value_gradients))
    ]
    if not variant.joint:
        return flat
    return [tuple(np.concatenate(pair, axis=1) for pair in zip(*flat, strict=True))]


def weighted(gradients: np.ndarray, weights: str) -> np.ndarray:
    """Gradients whose mean outer product is what the variant takes for the Fisher matrix."""
    if weights == "full":
        return gradients
    squares = (gradients**2).mean(axis=0)
    if weights == "none":
        squares[:] = squares.mean()
    return np.diag(np.sqrt(squares * len(squares))).astype(np.float32)


def entropy_bits(integers: np.ndarray) -> float:
    sizes = np.abs(integers).mean(axis=0)
    classes = np.round(2 * np.log2(sizes + 1e-4))
    bits = 0.0
    for each in np.unique(classes):
        _, counts = np.unique(integers[:, classes == each], return_counts=True)
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    return bits


def curve(layers: list[Layer], variant: Variant) -> list[tuple[float, float]]:
    """Ratio and harm at each step."""
    bits = np.zeros(len(STEPS))
    num_values, harm = 0, [0.0] * len(STEPS)
    for layer in layers:
        for values, gradients in parts_of(layer, variant):
            split = 2 * len(values) // 3
            slopes = weighted(gradients[:split], variant.weights)
            source = (Source(0, "k", 0),)
            positions = layer.positions[:split]
            band, _ = fit_band(source, values[:split], slopes, NO_FREQUENCIES, positions)
            exact = to_coefficients(values[split:], band, len(band.deviation))
            num_values += values[split:].size
            for index, step in enumerate(STEPS):
                integers = np.rint(exact / np.float32(step))
                bits[index] += entropy_bits(integers)
                restored = to_values(integers * np.float32(step), band)
                error = restored - values[split:]
                harm[index] = harm[index] + (error * gradients[split:]).sum(axis=1)
    return [(16 * num_values / b, float((h**2).mean())) for b, h in zip(bits, harm, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--every", type=int, default=3, help="only every so manieth layer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = Model.load(args.model)
    text = library_text(6 * args.windows * WINDOW_TOKENS)
    spans = windows_of_text(model, text, args.windows)
    layers = layers_of_windows(model, spans, lambda done, total: None)[:: args.every]
    print(f"{'ratio at a harm of':66}" + "".join(f"{harm:8g}" for harm in HARMS))
    for variant in VARIANTS:
        ratios, harms = zip(*curve(layers, variant), strict=True)
        at = np.exp(np.interp(np.log(HARMS), np.log(harms), np.log(ratios)))
        print(f"{variant.name:66}" + "".join(f"{ratio:8.2f}" for ratio in at), flush=True)


if __name__ == "__main__":
    main()
