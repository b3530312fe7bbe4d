"""`split_model`: a transformers model whose middle layers a stage runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcp_vllm.cache_folder import cache_root
from mcp_vllm.errors import McpError
from mcp_vllm.hf import library
from mcp_vllm.hf.errors import UnsplittableError
from mcp_vllm.hf.model_identity import text_config
from mcp_vllm.session.weights_identity import weights_identity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mcp_vllm.client import MCPClient
    from mcp_vllm.config.split import SplitConfig
    from mcp_vllm.split.client import LayerRange, StageClient
    from mcp_vllm.split.plan.partitioner import Plan


def split_model(
    model: PreTrainedModel,
    plan: Plan | SplitConfig | LayerRange,
    client: MCPClient | StageClient,
) -> PreTrainedModel:
    """Replace the layers of `plan` by a stage's; `model` is changed, and returned.

    The layers are dropped and their memory is freed, unless somebody else holds them. `generate`
    and calls work as before, with a DynamicCache or none; there are no gradients.

    Args:
        model: a causal language model of text. From a folder, or the Hub's cache: the stage's
            weights must be the same files.
        plan: what to run at the stage: a plan of TaskPartitioner, settings of --mcp-split, or
            layers as (4, 14) or "4:14".
        client: of stages that hold exactly these layers. It is connected at the first use.

    Raises:
        UnsplittableError: the model has other layers than these, or of an unknown kind.
        LibraryError: transformers is missing, or of a release that is not supported.
    """
    library.cache_utils()
    from mcp_vllm.split.client import StageClient
    from mcp_vllm.split.transformers_span import RemoteSpan

    first, end = _span(plan)
    stack = _checked_stack(model, first, end)
    stages = client if isinstance(client, StageClient) else client.stages
    span = RemoteSpan(stages.open((first, end), _weights_fact(model)), first)
    kept = [*stack.layers[:first], span, *stack.layers[end:]]
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    stack.layers = library.torch().nn.ModuleList(kept)
    stack.register_forward_pre_hook(span.note_mask, with_kwargs=True)
    _shorten_config(model, first, end)
    return model


def _span(plan: Any) -> tuple[int, int]:
    from mcp_vllm.config.split import SplitConfig, parse_layers
    from mcp_vllm.split.plan.partitioner import Plan

    if isinstance(plan, Plan):
        best = plan.found.best_split
        if best is None or best.split is None:
            raise UnsplittableError("the plan has no split that fits")
        return best.split
    if isinstance(plan, SplitConfig):
        return plan.span
    if isinstance(plan, str):
        return parse_layers(plan)
    if isinstance(plan, range):
        return plan.start, plan.stop
    return plan[0], plan[1]


def _checked_stack(model: Any, first: int, end: int) -> Any:
    """The module with the decoder layers. Raises UnsplittableError."""
    name = type(model).__name__
    config, stack = text_config(model), model.base_model
    layers = getattr(stack, "layers", None)
    if config is not model.config or stack is model or layers is None:
        raise UnsplittableError(f"{name} cannot be split: only text models with one stack can")
    if len(layers) != config.num_hidden_layers or getattr(config, "num_kv_shared_layers", 0):
        raise UnsplittableError(f"{name} cannot be split: its layers depend on each other")
    if not all(hasattr(getattr(each, "self_attn", None), "layer_idx") for each in layers):
        raise UnsplittableError(f"{name} cannot be split: it has layers without attention")
    if not 0 < first < end < len(layers):
        raise UnsplittableError(
            f"layers {first}:{end} of a model with {len(layers)}: the first and the last one must "
            f"stay here, so 1:{len(layers) - 1} is the most"
        )
    return stack


def _weights_fact(model: Any) -> dict[str, str]:
    """What the stage must agree with; nothing, where the model's files are not known."""
    folder = Path(model.config.name_or_path)
    try:
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(model.config.name_or_path, local_files_only=True))
        return {"model.weights": weights_identity(folder, cache_root())}
    except (McpError, OSError, ValueError):
        return {}


def _shorten_config(model: Any, first: int, end: int) -> None:
    """A configuration of the layers that are left, the span as one, for all modules."""
    old = model.config
    new = copy.deepcopy(old)
    new.num_hidden_layers = old.num_hidden_layers - (end - first) + 1
    types = getattr(old, "layer_types", None)
    if types is not None:
        # Its mask is not used; a window's would bound how much the cache is believed to hold.
        span = "full_attention" if "full_attention" in types else types[first]
        new.layer_types = [*types[:first], span, *types[end:]]
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
