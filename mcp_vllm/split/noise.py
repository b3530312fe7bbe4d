"""Local differential privacy for activations: clip each row, add Gaussian noise, keep the account.

The unit is a row, the hidden state of one token at the span's beginning. Clipped to the norm C, any
two rows are at most 2 C apart, so N(0, sigma^2) on each element satisfies rho-zCDP with
rho = (2 C)^2 / (2 sigma^2) for a row, whatever it was (Bun and Steinke, arXiv:1605.02658,
Proposition 1.6). zCDP adds up over adaptively chosen rows (Lemma 1.7), and rho-zCDP implies
(epsilon, delta)-DP with epsilon = rho + 2 sqrt(rho ln(1/delta)) for any delta (Proposition 1.3).

One token of a text changes its row and all later ones, so what protects a text is the epsilon of
the whole session. The floating-point samples are not hardened against attacks on their low bits
(Mironov, CCS 2012).
"""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mcp_vllm.split.activations import Activations
from mcp_vllm.split.errors import SplitError


class PrivacyBudgetSpent(SplitError):
    """More rows of this session would spend more than its epsilon."""


@dataclass(frozen=True)
class ActivationNoise:
    """Attributes:
    clip_norm: L2 norm that no row exceeds, C above.
    row_epsilon: of one row, at `delta`; the smaller, the more noise.
    delta: of a row and of a session.
    max_epsilon: of a session: rows that would go beyond are refused; None: no bound.
    """

    clip_norm: float
    row_epsilon: float
    delta: float = 1e-5
    max_epsilon: float | None = None

    def __post_init__(self) -> None:
        for name in ("clip_norm", "row_epsilon"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}, not a positive number")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is {self.delta}, not between 0 and 1")

    @property
    def row_rho(self) -> float:
        """zCDP of one row: where `epsilon` of one row is `row_epsilon`."""
        log = math.log(1 / self.delta)
        return (math.sqrt(log + self.row_epsilon) - math.sqrt(log)) ** 2

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on each element."""
        return 2 * self.clip_norm / math.sqrt(2 * self.row_rho)

    def epsilon(self, num_rows: int) -> float:
        """Of so many rows together, at `delta`."""
        rho = num_rows * self.row_rho
        return rho + 2 * math.sqrt(rho * math.log(1 / self.delta))

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [tokens, width], clipped and noisy, as float32 on the CPU."""
        wide = rows.detach().to("cpu", torch.float32)
        norms = wide.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        clipped: torch.Tensor = wide * (self.clip_norm / norms).clamp(max=1.0)
        return clipped + self.sigma * _standard_normal(wide.shape)


class NoisySessions:
    """Adds the noise, and counts what each session has spent. Safe for several threads."""

    def __init__(self, noise: ActivationNoise) -> None:
        self._noise = noise
        self._lock = threading.Lock()
        self._num_rows: Counter[str] = Counter()

    def add(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The rows to send, by session. Raises PrivacyBudgetSpent: none of them is counted."""
        most = self._noise.max_epsilon
        with self._lock:
            totals = {name: self._num_rows[name] + each.shape[0] for name, each in rows.items()}
            for name, total in totals.items():
                spent = self._noise.epsilon(total)
                if most is not None and spent > most:
                    raise PrivacyBudgetSpent(
                        f"session {name!r} would have spent epsilon {spent:.3g} after {total} "
                        f"tokens, max_epsilon is {most:g}"
                    )
            for name, total in totals.items():
                self._num_rows[name] = total
        return {name: self._noise.apply(each) for name, each in rows.items()}

    def fork(self, session: str, copy: str) -> None:
        """A session that begins with the rows of another has spent as much."""
        with self._lock:
            self._num_rows[copy] = self._num_rows[session]

    def forget(self, session: str) -> None:
        with self._lock:
            del self._num_rows[session]

    def epsilon(self, session: str) -> float:
        """What the session has spent so far, rows that were sent again not counted twice."""
        return self._noise.epsilon(self._num_rows[session])


def noisy_batch(
    sessions: NoisySessions, activations: Activations, counts: Mapping[str, int]
) -> Activations:
    """What an engine sends of a step: the rows, clipped and noisy, and a residual of zeros.

    The next layer's norm adds hidden and residual, so their sum is what a row tells.

    Args:
        counts: rows of each request, in their order.
    """
    hidden, residual = activations.hidden, activations.residual
    wide = hidden.float() if residual is None else hidden.float() + residual.float()
    parts = torch.split(wide, list(counts.values()))
    rows = torch.cat(list(sessions.add(dict(zip(counts, parts, strict=True))).values()))
    zeros = None if residual is None else torch.zeros_like(residual)
    return Activations(rows.to(hidden.device, hidden.dtype), zeros)


def _standard_normal(shape: torch.Size) -> torch.Tensor:
    """Box and Muller's samples from the system's randomness, which cannot be predicted."""
    count = shape.numel()
    raw = np.frombuffer(os.urandom(16 * count), dtype=np.uint64).reshape(2, count)
    uniform = ((raw >> np.uint64(11)) + 0.5) * 2.0**-53
    samples = np.sqrt(-2 * np.log(uniform[0])) * np.cos(2 * np.pi * uniform[1])
    return torch.from_numpy(samples.astype(np.float32)).view(shape)
