"""From `--mcp-split` to vLLM's settings: which executor and scheduler, eager, in one process.

Imports nothing of `split`: vLLM loads its classes by path, in the engine's process.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from mcp_vllm.config.address import Address
from mcp_vllm.config.split import SplitConfig
from mcp_vllm.errors import McpError
from mcp_vllm.vllm_plugin import CONNECTOR
from mcp_vllm.vllm_plugin.shared_cores import share_cores

logger = logging.getLogger(__name__)

EXECUTOR = "mcp_vllm.split.engine.executor.SplitExecutor"
SCHEDULER = "mcp_vllm.split.engine.scheduler.SplitScheduler"
SETTINGS_KEY = "mcp_split"
_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


class SplitFlagError(McpError):
    """`--mcp-split` with another flag that contradicts it; names both."""


def apply(args: Any, source: str) -> None:
    """Set what a split engine needs among vLLM's engine arguments (an object with attributes).

    Raises:
        SplitFlagError: another setting contradicts it.
        ConfigError: `source` is not valid.
    """
    config = SplitConfig.load(source)
    for name, flag, ours in (
        ("distributed_executor_backend", "--distributed-executor-backend", EXECUTOR),
        ("scheduler_cls", "--scheduler-cls", SCHEDULER),
    ):
        if getattr(args, name, None) not in (None, ours):
            raise SplitFlagError(f"--mcp-split contradicts {flag}: a split engine has its own")
        setattr(args, name, ours)
    if getattr(args, "async_scheduling", None):
        raise SplitFlagError("--mcp-split contradicts --async-scheduling: steps run one by one")
    transfer = getattr(args, "kv_transfer_config", None)
    if transfer is not None and transfer.kv_connector != CONNECTOR:
        raise SplitFlagError(
            f"--mcp-split contradicts --kv-connector {transfer.kv_connector}: only {CONNECTOR} "
            "knows that a stage has blocks, too"
        )
    if os.environ.get(_RUNNER, "0") not in ("0", ""):
        raise SplitFlagError(f"--mcp-split needs {_RUNNER}=0")
    os.environ[_RUNNER] = "0"
    args.async_scheduling = False
    if not getattr(args, "enforce_eager", False):
        logger.warning("--mcp-split: torch.compile and CUDA graphs are off (--enforce-eager)")
        args.enforce_eager = True
    if any(Address.parse(stage).is_loopback for stage in config.stages):
        share_cores(os.environ)
    if getattr(args, "max_num_batched_tokens", None) is None:
        args.max_num_batched_tokens = config.batch_tokens
    extra = dict(getattr(args, "additional_config", None) or {})
    extra[SETTINGS_KEY] = config.model_dump(mode="json")
    args.additional_config = extra
