"""All splits, what each would give, and the best one that fits both machines' memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mcp_vllm.split.plan.cost import CostModel, Load, Split

# Of the local memory this part stays free: the machine is somebody's, and does other things.
LOCAL_RESERVE = 0.30


@dataclass(frozen=True)
class Limits:
    """Memory in bytes: free on the local machine before anything is loaded, and the stage's."""

    local_bytes: int
    stage_bytes: int

    @property
    def usable_local_bytes(self) -> int:
        return int(self.local_bytes * (1 - LOCAL_RESERVE))


@dataclass(frozen=True)
class Candidate:
    """One way to run the model; `split` None: everything local.

    Attributes:
        ttft_s, token_s: predicted.
        request_s: of a whole answer; what is minimised.
        fits: both memories suffice.
    """

    split: Split | None
    ttft_s: float
    token_s: float
    request_s: float
    local_bytes: int
    stage_bytes: int
    fits: bool


@dataclass(frozen=True)
class Found:
    """Attributes:
    local: everything local.
    remote: everything remote that can be: embedding, first and last layer, norm and head stay.
    splits: all of them, the quickest first, those that do not fit last.
    """

    local: Candidate
    remote: Candidate
    splits: tuple[Candidate, ...]

    @property
    def best_split(self) -> Candidate | None:
        """The quickest split that fits; None: none does."""
        return self.splits[0] if self.splits[0].fits else None

    @property
    def best(self) -> Candidate | None:
        """The quickest of all that fits, everything local included; None: nothing fits."""
        fitting = [each for each in (self.local, self.best_split) if each is not None and each.fits]
        return min(fitting, key=lambda each: each.request_s, default=None)

    @property
    def pays(self) -> bool:
        """Whether a split is better than everything local."""
        return self.best is not None and self.best.split is not None


def all_splits(num_layers: int) -> Iterator[Split]:
    """Every span of layers that may run elsewhere; the first and the last layer stay."""
    for first in range(1, num_layers - 1):
        for end in range(first + 1, num_layers):
            yield first, end


def search(model: CostModel, load: Load, limits: Limits) -> Found:
    """Raises ValueError: a model of fewer than three layers has no split."""
    num_layers = model.shape.num_layers
    if num_layers < 3:
        raise ValueError(f"a model of {num_layers} layers cannot be split: 3 are the least")
    made = {split: evaluate(model, load, limits, split) for split in all_splits(num_layers)}
    ordered = sorted(made.values(), key=lambda each: (not each.fits, each.request_s, each.split))
    return Found(evaluate(model, load, limits, None), made[1, num_layers - 1], tuple(ordered))


def evaluate(model: CostModel, load: Load, limits: Limits, split: Split | None) -> Candidate:
    ttft_s, token_s = model.ttft_s(load, split), model.token_s(load, split)
    local = model.local_bytes(load, split)
    stage = 0 if split is None else model.stage_bytes(load, split)
    return Candidate(
        split,
        ttft_s,
        token_s,
        ttft_s + (load.answer - 1) * token_s,
        local,
        stage,
        local <= limits.usable_local_bytes and stage <= limits.stage_bytes,
    )
