"""Loading the span's layers: a vLLM model that believes to be the middle of a pipeline.

The stage loads its layers so, and an engine without a stage the layers that it lacks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from vllm.distributed import parallel_state
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import base_loader
from vllm.model_executor.models.utils import PPMissingLayer

from mcp_vllm.split.engine.layers import OnlySpan, building


class MiddleOfPipeline:
    """Stands in for vLLM's pipeline group: rank 1 of 3, with nobody to talk to."""

    world_size = 3
    rank_in_group = 1
    rank = 1
    ranks = (0, 1, 2)
    is_first_rank = False
    is_last_rank = False


@contextlib.contextmanager
def middle_of_pipeline() -> Iterator[None]:
    """vLLM's code that runs inside takes this process for the middle of a pipeline."""
    actual = parallel_state._PP
    parallel_state._PP = MiddleOfPipeline()  # type: ignore[assignment]
    try:
        yield
    finally:
        parallel_state._PP = actual


@contextlib.contextmanager
def loading_only(plan: OnlySpan) -> Iterator[None]:
    """Models loaded inside have the plan's layers, and neither embeddings nor a head.

    Some models build these on every rank; here they go before any weight is read.
    """
    initialize_model = base_loader.initialize_model

    def without_embeddings(*args: object, **kwargs: object) -> torch.nn.Module:
        model = initialize_model(*args, **kwargs)
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, VocabParallelEmbedding):
                    setattr(module, name, PPMissingLayer())
        return model

    base_loader.initialize_model = without_embeddings
    try:
        with middle_of_pipeline(), building(plan):
            yield
    finally:
        base_loader.initialize_model = initialize_model
