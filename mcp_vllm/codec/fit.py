"""From samples of a model's K and V, and of the loss's gradients by them, to a calibration.

An error e of a band harms the output by about e' F e, F the mean outer product of the gradients
(the Fisher information). With F = S S', errors of S'x all count the same, so S'x is what is
decorrelated, by the eigenvectors of its covariance (KLT), and quantised with one step for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mcp_vllm.codec.calibration import Band, Calibration
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


def fit_band(
    sources: tuple[Source, ...], values: Float32s, gradients: Float32s, frequencies: Float32s
) -> tuple[Band, Float32s]:
    """The band of samples [sample, channel], and their coefficients in standard deviations.

    K is given unrotated, and so are its gradients: `rotation.rotate` by negative angles.
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
    band = Band(
        sources,
        *(
            np.ascontiguousarray(part, np.float32)
            for part in (mean, analysis, synthesis, deviations[:num_kept], frequencies)
        ),
    )
    spread = np.maximum(deviations[:num_kept], np.finfo(np.float32).tiny)
    return band, (centred @ analysis / spread).astype(np.float32)


def tail_of(coefficients: Sequence[NDArray[Any]]) -> Float32s:
    """How often coefficients, in standard deviations, are beyond each point: Calibration.tail."""
    points = Calibration.TAIL_REACH * (np.arange(Calibration.TAIL_POINTS) / 256.0) ** 2
    beyond = np.zeros(Calibration.TAIL_POINTS)
    for each in coefficients:
        magnitudes = np.sort(np.abs(each), axis=None)
        beyond += len(magnitudes) - np.searchsorted(magnitudes, points, side="right")
    return (beyond / sum(each.size for each in coefficients)).astype(np.float32)
