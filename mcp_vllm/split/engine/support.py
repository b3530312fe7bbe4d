"""What of an engine's configuration can be split, and what both sides must agree on."""

from __future__ import annotations

import logging

import torch
from vllm.config import CompilationMode, VllmConfig
from vllm.platforms import current_platform

from mcp_vllm.config.split import SplitConfig
from mcp_vllm.split.activations import EXACT_FORMS
from mcp_vllm.split.engine.machine import native_dtypes
from mcp_vllm.split.errors import SplitError
from mcp_vllm.vllm_plugin import CONNECTOR
from mcp_vllm.vllm_plugin.compat import release, vllm_version
from mcp_vllm.vllm_plugin.fingerprint import model_facts

logger = logging.getLogger(__name__)


# vLLM's implementation computes with activations between the layers, too.
_MIXING = "SolarForCausalLM"


class SplitUnsupported(SplitError):
    """An engine that cannot be split as it is configured; names the setting."""


def check_supported(config: VllmConfig) -> None:
    """Raises SplitUnsupported."""
    model, parallel = config.model_config, config.parallel_config
    transfer = config.kv_transfer_config
    unsupported = {
        "--tensor-parallel-size above 1": parallel.tensor_parallel_size > 1,
        "--pipeline-parallel-size above 1": parallel.pipeline_parallel_size > 1,
        "--data-parallel-size above 1": parallel.data_parallel_size > 1,
        f"another KV connector than {CONNECTOR}": transfer is not None
        and transfer.kv_connector != CONNECTOR,
        "a KV connector where KV blocks are not in host memory": transfer is not None
        and not current_platform.is_cpu(),
        "speculative decoding": config.speculative_config is not None,
        "LoRA": config.lora_config is not None,
        "async scheduling": bool(config.scheduler_config.async_scheduling),
        "a multimodal model": model.is_multimodal_model,
        "an encoder-decoder model": model.is_encoder_decoder,
        "a pooling model": model.runner_type == "pooling",
        "a model with recurrent or attention-free layers": model.is_hybrid
        or model.is_attention_free,
        "vLLM's second model runner: set VLLM_USE_V2_MODEL_RUNNER=0": config.use_v2_model_runner,
        "a model that computes between its layers": _MIXING in model.architectures,
        "torch.compile: give --enforce-eager": config.compilation_config.mode
        not in (None, CompilationMode.NONE),
        "KV cache scales a token": str(config.cache_config.cache_dtype).endswith("_per_token_head"),
    }
    for what, found in unsupported.items():
        if found:
            raise SplitUnsupported(f"a layer split does not support {what}")
    if not model.registry.is_pp_supported_model(model.architectures, model):
        raise SplitUnsupported(
            f"{model.architectures[0]} cannot be split: vLLM's implementation does not support "
            "pipeline parallelism"
        )


def check_connector(config: VllmConfig, split: SplitConfig) -> None:
    """Raises SplitUnsupported: what a connector would store is not what a whole engine computes, or
    would take it to a stage without the noise that was asked for."""
    if config.kv_transfer_config is None:
        return
    for setting, found in (
        (f"stage_dtype {split.stage_dtype}", split.stage_dtype is not None),
        (f"form {split.form}", split.form not in EXACT_FORMS),
        ("noise", split.noise is not None),
    ):
        if found:
            raise SplitUnsupported(f"{setting} of --mcp-split does not go with --kv-connector")


def check_dtypes(ours: torch.dtype, stage: str | None) -> None:
    """Raises SplitUnsupported: KV blocks of the two sides would differ in size."""
    if stage is not None and ours.itemsize != 2:
        raise SplitUnsupported(
            f"stage_dtype {stage} goes with --dtype float16 or bfloat16, not with {ours}"
        )


def warn_if_slow(config: VllmConfig, device: torch.device) -> None:
    """Say so when this machine has no instructions for the model's dtype."""
    name = str(config.model_config.dtype).removeprefix("torch.")
    native = native_dtypes(device)
    if name not in native:
        logger.warning(
            "this machine does not compute in %s, only in %s: steps are slow; each side may "
            "have a --dtype of its own (stage_dtype)",
            name,
            ", ".join(native),
        )


def num_layers(config: VllmConfig) -> int:
    return int(config.model_config.hf_text_config.num_hidden_layers)


def agreed_facts(config: VllmConfig) -> dict[str, str]:
    """Names and values that engine and stage must share, the most telling ones first.

    Reads the model's weights once: their identity is cached on disk.
    """
    return {
        **model_facts(config),
        "block_tokens": str(config.cache_config.block_size),
        "vllm": release(vllm_version() or "unknown"),
    }
