"""How far a model that continues from a restored context is from itself without the codec."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mcp_vllm.quality.model import Model, Tensors, cache_of


@dataclass(frozen=True)
class Reference:
    """A continuation after the context as it was: log-probabilities float32 [token, word]."""

    log_probabilities: torch.Tensor
    nll: torch.Tensor
    greedy: list[int]


@dataclass(frozen=True)
class Score:
    """One segment.

    Attributes:
        delta_nll: how many nats a token of the text has become less likely, on average.
        kl: Kullback-Leibler divergence from the reference, nats per token.
        top1: share of tokens whose most likely word is the reference's.
        greedy_match: how many tokens of a greedy answer are the reference's, up to the first that
            is not; None when none were asked for.
    """

    delta_nll: float
    kl: float
    top1: float
    greedy_match: int | None


def refer(model: Model, tensors: Tensors, continuation: torch.Tensor, num_greedy: int) -> Reference:
    """Score int64 [1, token] after the context of these K and V."""
    log_probabilities = _log_probabilities(model, tensors, continuation)
    greedy = _greedy(model, tensors, continuation, num_greedy)
    return Reference(log_probabilities, _nll(log_probabilities, continuation), greedy)


def score(
    model: Model, tensors: Tensors, continuation: torch.Tensor, reference: Reference
) -> Score:
    """The same after a restored context, against ``reference``."""
    ours = _log_probabilities(model, tensors, continuation)
    theirs = reference.log_probabilities
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    answer = _greedy(model, tensors, continuation, len(reference.greedy))
    return Score(
        delta_nll=float((_nll(ours, continuation) - reference.nll).mean()),
        kl=float(kl),
        top1=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        greedy_match=_common_length(answer, reference.greedy) if reference.greedy else None,
    )


@torch.inference_mode()
def _log_probabilities(model: Model, tensors: Tensors, continuation: torch.Tensor) -> torch.Tensor:
    """Of the words after each token of the continuation but the last: float32 [token, word]."""
    output = model.network(continuation[:, :-1], past_key_values=cache_of(tensors), use_cache=True)
    return output.logits[0].float().log_softmax(-1)


def _nll(log_probabilities: torch.Tensor, continuation: torch.Tensor) -> torch.Tensor:
    return -log_probabilities.gather(1, continuation[0, 1:, None])[:, 0]


@torch.inference_mode()
def _greedy(
    model: Model, tensors: Tensors, continuation: torch.Tensor, num_tokens: int
) -> list[int]:
    """The most likely answer after the context and the continuation's first token."""
    if not num_tokens:
        return []
    cache = cache_of(tensors)
    token, answer = continuation[:, :1], []
    for _ in range(num_tokens):
        logits = model.network(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
        answer.append(int(token))
    return answer


def _common_length(left: list[int], right: list[int]) -> int:
    pairs = zip(left, right, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(left))
