"""What was measured, as JSON: the times of one machine's layers and steps, and those of a link.

Written by `mcp-vllm plan --measure`, read by `--local` and `--cloud`. A file may come from somebody
else's machine, so everything in it has bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mcp_vllm.split.errors import SplitError
from mcp_vllm.split.plan.shape import Dtype, ModelShape, Work

_MAX_FILE_BYTES = 16 << 20
_MAX_SAMPLES = 20_000
# How long a measured step waits, as one of a split does: longer than OpenMP's threads spin.
WAIT_S = 0.02
_LEAST_S = 1e-9  # of a layer
Seconds = Annotated[float, Field(gt=0, lt=86_400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1 << 24)]
Name = Annotated[str, Field(max_length=200)]


class FiguresError(SplitError):
    """A file of figures that cannot be used; names the file, the flag and the fault."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StepTime(_Strict):
    """The seconds of a step, or of a part of it; the step as in shape.Work."""

    requests: Count
    tokens: Count
    context: Count
    seconds: Seconds

    @model_validator(mode="after")
    def _is_a_step(self) -> StepTime:
        if self.tokens > self.context:
            raise ValueError(f"{self.tokens} new tokens at a context of {self.context}")
        return self

    @property
    def work(self) -> Work:
        return Work(self.requests, self.tokens, self.context)


class LayerTime(StepTime):
    """The layers [first, end) of the model in that step, together."""

    first: int = Field(ge=0, lt=10_000)
    end: int = Field(ge=1, le=10_000)

    @model_validator(mode="after")
    def _has_layers(self) -> LayerTime:
        if self.first >= self.end:
            raise ValueError(f"layers {self.first}:{self.end}")
        return self


class Figures(_Strict):
    """One machine with one model."""

    version: Literal[1] = 1
    kind: Literal["engine", "stage"]
    """Whose the rest of a step is: an engine's (scheduler, embedding, head) or a stage's."""

    machine: Name
    model: Name
    hidden: Count
    dtype: Dtype
    dtypes: list[Dtype] = Field(min_length=1, max_length=3)
    """What the machine computes in natively."""

    memory_bytes: int = Field(ge=1, lt=1 << 50)
    """For weights and KV: what was free before the model was loaded."""

    layers: list[LayerTime] = Field(min_length=1, max_length=_MAX_SAMPLES)
    rest: list[StepTime] = Field(max_length=_MAX_SAMPLES)
    """A step without its layers."""

    resume_s: Annotated[float, Field(ge=0, lt=3600, allow_inf_nan=False)] = 0.0
    """What a step takes more that waits in its middle, beside that: threads that slept are woken,
    caches have gone cold. Part of a stage's times already: it waits before each step."""

    def check_model(self, shape: ModelShape, flag: str) -> None:
        """Raises FiguresError: measured on another model than the one of `shape`."""
        if self.hidden != shape.hidden or max(each.end for each in self.layers) > shape.num_layers:
            raise FiguresError(
                f"{flag}: figures of {self.model} (width {self.hidden}) do not belong to "
                f"{shape.name} (width {shape.hidden}, {shape.num_layers} layers): measure it again"
            )
        if self.dtype != shape.dtype:
            raise FiguresError(
                f"{flag}: measured in {self.dtype}, and the plan is for {shape.dtype}: "
                "measure it again, or give another --dtype"
            )

    def slow_because(self, flag: str) -> str | None:
        """What to tell users of a machine that converts before it multiplies; None: nothing."""
        if self.dtype in self.dtypes:
            return None
        return (
            f"{flag}: {self.machine} does not compute in {self.dtype}, only in "
            f"{', '.join(self.dtypes)}: it is slow, and another --dtype may be quicker"
        )


class Transfer(_Strict):
    """`bytes` in both directions together, and what the way took: there, and back."""

    bytes: int = Field(ge=0, lt=1 << 40)
    seconds: Annotated[float, Field(ge=0, lt=86_400, allow_inf_nan=False)]


class LinkFigures(_Strict):
    """A link, as it was measured through a stage's protocol."""

    version: Literal[1] = 1
    transfers: list[Transfer] = Field(min_length=2, max_length=_MAX_SAMPLES)


def typical(seconds: Sequence[float]) -> float:
    """The lower quartile of repeated measurements: other processes make steps slower, never
    quicker, so on a busy machine it says more of this one than the median."""
    return float(np.quantile(seconds, 0.25))


def typical_layers(steps: Sequence[Sequence[float]]) -> list[float]:
    """Each layer's seconds in a typical step, of repeated steps [step][layer].

    They sum up to what is typical of the steps: one that lasts longer than a machine's quick
    moments has slow ones, too, and never the quickest of every layer.
    """
    quickest = [typical(each) for each in zip(*steps, strict=True)]
    scale = typical([sum(each) for each in steps]) / max(sum(quickest), _LEAST_S)
    return [max(each * scale, _LEAST_S) for each in quickest]


def typical_times(
    work: Work, layers: Sequence[Sequence[float]], rest: Sequence[float], first: int = 0
) -> tuple[list[LayerTime], StepTime]:
    """What is typical of repeated steps: each layer's time, and that of all else.

    Args:
        layers: seconds [step][layer], from layer `first` on.
        rest: seconds [step].
    """
    step = {"requests": work.requests, "tokens": work.tokens, "context": work.context}
    times = [
        LayerTime(**step, first=index, end=index + 1, seconds=seconds)
        for index, seconds in enumerate(typical_layers(layers), first)
    ]
    return times, StepTime(**step, seconds=typical(rest))


def read_figures(path: Path, flag: str) -> Figures:
    """Raises FiguresError."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise FiguresError(f"{flag} {path}: larger than any file of figures")
        return Figures.model_validate_json(path.read_bytes())
    except OSError as error:
        raise FiguresError(f"{flag} {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FiguresError(
            f"{flag} {path}: {where}: {first['msg']}; `mcp-vllm plan --measure` writes such files"
        ) from error


def write_figures(path: Path, figures: Figures) -> None:
    """Raises FiguresError."""
    try:
        path.write_text(figures.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise FiguresError(f"--output {path}: {error.strerror}") from error
