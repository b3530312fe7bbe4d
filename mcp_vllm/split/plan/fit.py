"""From measured times to rates: what a machine computes, reads and loses a second, and a link.

Least absolute relative errors (reweighted least squares), with coefficients that cannot be
negative: at most three of them, so that every set of them is tried. The roofline
`max(flops/F, bytes/M) + o` becomes linear once it is known which samples compute and which read;
that depends on one number, the arithmetic intensity where they change over, and all of its values
are tried.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mcp_vllm.split.plan.figures import Figures, FiguresError, LayerTime, LinkFigures, StepTime
from mcp_vllm.split.plan.shape import LayerShape, ModelShape, Work

Array = npt.NDArray[np.float64]
_MAX_TURNS = 64
_BURSTS = 65  # sizes of a burst that are tried
_ROUNDS = 12
_CLOSE = 0.02  # relative errors below this are as good as none


@dataclass(frozen=True)
class Rates:
    """Of one machine in one phase: seconds a FLOP, a byte read, and a layer.

    `error` is the median relative error over the samples that it was fitted to.
    """

    flop_s: float
    byte_s: float
    layer_s: float
    error: float = 0.0

    def layer_time_s(self, layer: LayerShape, work: Work) -> float:
        return (
            max(layer.flops(work) * self.flop_s, layer.bytes_read(work) * self.byte_s)
            + self.layer_s
        )


@dataclass(frozen=True)
class Rest:
    """A step without its layers: seconds a step, a token and a request."""

    step_s: float
    token_s: float
    request_s: float
    error: float = 0.0

    def time_s(self, work: Work) -> float:
        return self.step_s + self.token_s * work.num_tokens + self.request_s * work.requests


NO_REST = Rest(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class MachineFit:
    """One machine, prefill and decode apart; `resume_s` more, if a step waits in its middle."""

    prefill: Rates
    decode: Rates
    prefill_rest: Rest
    decode_rest: Rest
    resume_s: float = 0.0

    def rates(self, work: Work) -> Rates:
        return self.decode if work.is_decode else self.prefill

    def rest_s(self, work: Work) -> float:
        return (self.decode_rest if work.is_decode else self.prefill_rest).time_s(work)


@dataclass(frozen=True)
class LinkFit:
    """`rtt_s` a step, and seconds a byte of both directions together; the first `burst_bytes` of a
    step take no time, as where a token bucket bounds the bandwidth."""

    rtt_s: float
    byte_s: float
    error: float = 0.0
    burst_bytes: float = 0.0

    def time_s(self, num_bytes: float) -> float:
        return self.rtt_s + max(0.0, num_bytes - self.burst_bytes) * self.byte_s


def fit_machine(figures: Figures, shape: ModelShape, flag: str, as_stage: bool) -> MachineFit:
    """Rates of a machine's figures.

    Args:
        as_stage: the rest of an engine's step does not happen at a stage: it is left out.

    Raises:
        FiguresError: of another model, or too few samples; names `flag`.
    """
    figures.check_model(shape, flag)
    first_s, layers = _without_first(figures.layers, shape)
    resume_s, rest = figures.resume_s, figures.rest
    if figures.kind == "stage":
        resume_s += first_s
    elif as_stage:
        rest = []
    else:
        rest = [each.model_copy(update={"seconds": each.seconds + first_s}) for each in rest]
    rates = {}
    for is_decode in (False, True):
        samples = [each for each in layers if each.work.is_decode == is_decode]
        if len({each.work for each in samples}) < 2:
            phase = "decode" if is_decode else "prefill"
            raise FiguresError(f"{flag}: fewer than two {phase} steps were measured")
        rates[is_decode] = fit_rates(samples, shape)
    return MachineFit(
        rates[False],
        rates[True],
        _fit_rest([each for each in rest if not each.work.is_decode]),
        _fit_rest([each for each in rest if each.work.is_decode]),
        resume_s,
    )


def fit_rates(samples: Sequence[LayerTime], shape: ModelShape) -> Rates:
    """The roofline that is nearest to the samples of one phase (at least two)."""
    flops, read, seconds, owner = _terms(samples, shape)
    counts = np.array([each.end - each.first for each in samples], float)
    intensity = flops / read
    turns = np.unique(intensity).tolist()
    if len(turns) > _MAX_TURNS:
        turns = np.quantile(turns, np.linspace(0, 1, _MAX_TURNS)).tolist()
    candidates: list[tuple[float, Rates]] = []
    for turn in (*turns, math.inf):  # all compute ... all read
        computes = intensity >= turn
        columns = np.stack(
            [
                np.bincount(owner, flops * computes, len(samples)),
                np.bincount(owner, read * ~computes, len(samples)),
                counts,
            ],
            axis=1,
        )
        flop_s, byte_s, layer_s = _least_squares(columns, seconds)
        # What no sample shows is at least as quick as what hides it.
        if not computes.any():
            flop_s = float(np.min(read * byte_s / flops))
        elif computes.all():
            byte_s = float(np.min(flops * flop_s / read))
        time_s = np.bincount(owner, np.maximum(flops * flop_s, read * byte_s), len(samples))
        errors = np.abs((time_s + counts * layer_s) / seconds - 1)
        rates = Rates(flop_s, byte_s, layer_s, float(np.median(errors)))
        candidates.append((float(np.mean(errors)), rates))
    return min(candidates, key=lambda each: each[0])[1]


def fit_link(figures: LinkFigures) -> LinkFit:
    """RTT, bandwidth and burst from transfers of different sizes, half of them above the burst."""
    size = np.array([each.bytes for each in figures.transfers], float)
    seconds = np.array([max(each.seconds, 1e-7) for each in figures.transfers])
    candidates: list[tuple[float, LinkFit]] = []
    for burst in np.linspace(0, np.median(size), _BURSTS):
        columns = np.stack([np.ones_like(size), np.maximum(size - burst, 0)], axis=1)
        rtt_s, byte_s = _least_squares(columns, seconds)
        errors = np.abs(columns @ [rtt_s, byte_s] / seconds - 1)
        fit = LinkFit(rtt_s, byte_s, float(np.median(errors)), float(burst))
        # Below the smallest size no burst can be told from another: of equals the first.
        candidates.append((round(float(np.mean(errors)), 4), fit))
    return min(candidates, key=lambda each: each[0])[1]


def _terms(samples: Sequence[LayerTime], shape: ModelShape) -> tuple[Array, Array, Array, Array]:
    """FLOPs and bytes of every layer of every sample, the samples' seconds, and whose each is."""
    flops, read, owner = [], [], []
    for number, sample in enumerate(samples):
        for layer in shape.layers[sample.first : sample.end]:
            flops.append(layer.flops(sample.work))
            read.append(layer.bytes_read(sample.work))
            owner.append(number)
    seconds = np.array([each.seconds for each in samples])
    return np.array(flops), np.array(read), seconds, np.array(owner)


def _without_first(
    samples: Sequence[LayerTime], shape: ModelShape
) -> tuple[float, Sequence[LayerTime]]:
    """What the first measured layer of a decode step takes more than others of its shape, and the
    samples without it.

    It is the first after a wait, or after other work: that belongs to a step, not to a layer.
    """
    alone = [each for each in samples if each.end - each.first == 1]
    first = min((each.first for each in alone), default=0)
    likes: defaultdict[Work, list[float]] = defaultdict(list)
    for each in alone:
        if each.first != first and shape.layers[each.first] == shape.layers[first]:
            likes[each.work].append(each.seconds)
    more = [
        each.seconds - statistics.median(likes[each.work])
        for each in alone
        if each.first == first and each.work.is_decode and likes[each.work]
    ]
    first_s = max(0.0, statistics.median(more)) if more else 0.0
    return first_s, [
        each.model_copy(update={"seconds": max(each.seconds - first_s, 1e-9)})
        if each.first == first
        else each
        for each in samples
    ]


def _fit_rest(samples: Sequence[StepTime]) -> Rest:
    if not samples:
        return NO_REST
    columns = np.array(
        [[1.0, each.work.num_tokens, each.requests] for each in samples], dtype=float
    )
    seconds = np.array([each.seconds for each in samples])
    step_s, token_s, request_s = _least_squares(columns, seconds)
    error = float(np.median(np.abs(columns @ [step_s, token_s, request_s] / seconds - 1)))
    return Rest(step_s, token_s, request_s, error)


def _least_squares(columns: Array, seconds: Array) -> tuple[float, ...]:
    """x >= 0 with columns @ x next to seconds, relatively, and not drawn off by a few outliers:
    samples far off count less each time it is solved."""
    relative = columns / seconds[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)
    relative = relative / scale
    weights = np.ones(len(seconds))
    for _ in range(_ROUNDS):
        solved = _non_negative(relative * weights[:, None], weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(relative @ solved - 1), _CLOSE))
    return tuple(float(each) for each in solved / scale)


def _non_negative(columns: Array, target: Array) -> Array:
    """Least squares with x >= 0: tries every set of positive x."""
    number = columns.shape[1]
    best, best_loss = np.zeros(number), math.inf
    for chosen in _subsets(number):
        part = columns[:, chosen]
        if not part.any(axis=0).all():
            continue
        solved = np.linalg.lstsq(part, target, rcond=1e-9)[0]
        if (solved < 0).any():
            continue
        loss = float(np.sum((part @ solved - target) ** 2))
        if loss < best_loss - 1e-12:
            best, best_loss = np.zeros(number), loss
            best[chosen] = solved
    return best


def _subsets(number: int) -> list[list[int]]:
    """All non-empty sets of columns, the largest first."""
    return [
        list(each)
        for size in range(number, 0, -1)
        for each in itertools.combinations(range(number), size)
    ]
