"""Made-up models, machines and their figures, for tests of planning."""

from __future__ import annotations

from collections.abc import Iterable

from mcp_vllm.split.activations import FormCost
from mcp_vllm.split.plan.figures import Figures, LayerTime, StepTime
from mcp_vllm.split.plan.fit import MachineFit, Rates, Rest
from mcp_vllm.split.plan.shape import LayerShape, ModelShape, Work

FORMS = {
    "raw": FormCost(2048, 0, 0),
    "packed": FormCost(1536, 2e-5, 1e-4),
    "fold": FormCost(1024, 0, 0),
    "fp8": FormCost(516, 0, 0),
}


def shape_of_layers(
    num_layers: int, weight_bytes: int = 4 << 20, kv_bytes: int = 512
) -> ModelShape:
    """Every third layer is half as large again."""
    layers = []
    for i in range(num_layers):
        size = weight_bytes * 3 // 2 if i % 3 == 2 else weight_bytes
        layers.append(LayerShape(size // 2, size, float(size), 2048.0, 2048.0, kv_bytes))
    return ModelShape("made-up", "bfloat16", 512, tuple(layers), 8 << 20, 4 << 20, 1e6, FORMS)


def machine(speed: float = 1.0, step_s: float = 1e-3) -> MachineFit:
    rates = Rates(2e-11 / speed, 1e-10 / speed, 2e-4 / speed)
    rest = Rest(step_s, 1e-6, 1e-5)
    return MachineFit(rates, rates, rest, rest, resume_s=step_s / 4)


def figures_of(fit: MachineFit, shape: ModelShape, works: Iterable[Work], **changed) -> Figures:
    """What a machine that is exactly like its fit would be measured to be."""
    layers, rest = [], []
    for work in works:
        step = {"requests": work.requests, "tokens": work.tokens, "context": work.context}
        rest.append(StepTime(**step, seconds=fit.rest_s(work)))
        for i, layer in enumerate(shape.layers):
            seconds = fit.rates(work).layer_time_s(layer, work)
            layers.append(LayerTime(**step, first=i, end=i + 1, seconds=seconds))
    given = {
        "kind": "engine",
        "machine": "made-up",
        "model": shape.name,
        "hidden": shape.hidden,
        "dtype": shape.dtype,
        "dtypes": ["float32", "bfloat16"],
        "memory_bytes": 1 << 30,
        "layers": layers,
        "rest": rest,
        "resume_s": fit.resume_s,
    }
    return Figures(**given | changed)


WORKS = (
    *(Work(1, tokens, context) for tokens in (16, 64, 256) for context in (256, 600)),
    *(Work(batch, 1, context) for batch in (1, 2, 8) for context in (32, 300, 2000)),
)
