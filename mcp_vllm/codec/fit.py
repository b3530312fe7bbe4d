"""From samples of a model's K and V, and of the loss's gradients by them, to a calibration.

An error e of a band harms the output by about e' F e, F the mean outer product of the gradients
(the Fisher information). With F = S S', errors of S'x all count the same, so S'x is what is
decorrelated, by the eigenvectors of its covariance (KLT), and quantised with one step for all.

How much a token matters differs by orders of magnitude, and a good part of it shows in the token's
own K and V: K, for one, says how much it will be attended to. A linear regression of the logarithm
of the squared gradients foretells it, and harm is least for the bits where what matters more has a
smaller step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mcp_vllm.codec.calibration import MAX_LEVEL, Band, Calibration
from mcp_vllm.codec.planes import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcp_vllm.codec.kernel import Float32s

# How much of F is replaced by its diagonal: estimated from few thousand tokens, the rest is noisy.
_SHRINKAGE = 0.1
# A channel is taken to matter at least this much of the band's mean.
_LEAST_WEIGHT = 1e-3
# Coefficients that vary less than this are never kept: a hundredth of the finest useful step.
_LEAST_DEVIATION = 1e-5
# How far the regression of levels is held back: estimated from few samples, and they are noisy.
_LEVEL_RIDGE = 0.05
# A step that follows the foretold root of the sensitivity in full would trust it too far.
_LEVEL_EXPONENT = 0.5


def fit_band(
    sources: tuple[Source, ...],
    values: Float32s,
    gradients: Float32s,
    frequencies: Float32s,
    positions: NDArray[np.int64],
) -> tuple[Band, Float32s]:
    """The band of samples [sample, channel], and their coefficients in standard deviations.

    K is given unrotated, and so are its gradients: `rotation.rotate` by negative angles.
    ``positions`` [sample]: of the token in its window.
    """
    mean = values.mean(axis=0)
    centred = values.astype(np.float64) - mean
    fisher = gradients.astype(np.float64).T @ gradients / len(gradients)
    weights = np.diag(fisher) + _LEAST_WEIGHT * np.diag(fisher).mean() + np.finfo(np.float32).tiny
    fisher = (1 - _SHRINKAGE) * fisher + _SHRINKAGE * np.diag(weights)
    strengths, directions = np.linalg.eigh(fisher)
    roots = np.sqrt(np.maximum(strengths, 1e-12 * strengths.max()))
    weighted = directions * roots
    covariance = weighted.T @ (centred.T @ centred / len(centred)) @ weighted
    variances, axes = np.linalg.eigh(covariance)
    falling = np.argsort(variances)[::-1]
    deviations = np.sqrt(np.maximum(variances[falling], 0))
    num_kept = max(1, int((deviations > _LEAST_DEVIATION).sum()))
    kept = falling[:num_kept]
    analysis = weighted @ axes[:, kept]
    synthesis = axes[:, kept].T @ (directions / roots).T
    spread = np.maximum(deviations[:num_kept], np.finfo(np.float32).tiny)
    coefficients = centred @ analysis / spread
    sensitivities = ((gradients @ synthesis.T) ** 2).mean(axis=1)
    weights, usual_level = _fit_levels(coefficients, sensitivities, positions)
    parts = (
        mean,
        analysis,
        synthesis,
        deviations[:num_kept],
        frequencies,
        analysis @ (weights / spread),
        [usual_level],
    )
    band = Band(sources, *(np.ascontiguousarray(part, np.float32) for part in parts))
    return band, coefficients.astype(np.float32)


def _fit_levels(
    coefficients: NDArray[Any], sensitivities: NDArray[Any], positions: NDArray[np.int64]
) -> tuple[NDArray[Any], float]:
    """Weights [coefficient] and constant of a token's level, from its squared gradients [sample].

    Of the mean harm at the same step, levels change nothing.
    """
    usual = sensitivities.mean() + np.finfo(np.float32).tiny
    logarithms = np.log(sensitivities / usual + _LEAST_WEIGHT)
    # A late token of a window has few that could attend to it: no property of the token.
    share = positions / (positions.max() + 1.0)
    trend = np.stack([np.ones_like(share), share, share**2, np.log1p(positions)], axis=1)
    samples = np.concatenate([coefficients, trend], axis=1)
    num_coefficients = coefficients.shape[1]
    ridge = np.full(samples.shape[1], _LEVEL_RIDGE * len(samples))
    ridge[num_coefficients:] = 1e-6 * len(samples)
    fitted = np.linalg.solve(samples.T @ samples + np.diag(ridge), samples.T @ logarithms)
    weights = -_LEVEL_EXPONENT / np.log(2.0) * fitted[:num_coefficients]
    levels = coefficients @ weights
    for usual_level in np.arange(MAX_LEVEL, -MAX_LEVEL, -1.0 / 16):
        rounded = np.clip(np.rint(levels + usual_level), -MAX_LEVEL, MAX_LEVEL)
        if (sensitivities * 2.0**rounded).mean() <= usual:
            return weights, float(usual_level)
    return weights, 0.0


def tail_of(coefficients: Sequence[NDArray[Any]]) -> Float32s:
    """How often coefficients, in standard deviations, are beyond each point: Calibration.tail."""
    points = Calibration.TAIL_REACH * (np.arange(Calibration.TAIL_POINTS) / 256.0) ** 2
    beyond = np.zeros(Calibration.TAIL_POINTS)
    for each in coefficients:
        magnitudes = np.sort(np.abs(each), axis=None)
        beyond += len(magnitudes) - np.searchsorted(magnitudes, points, side="right")
    return (beyond / sum(each.size for each in coefficients)).astype(np.float32)
