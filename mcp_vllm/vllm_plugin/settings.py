"""From vLLM's KVTransferConfig to our configuration, and to what the offloading framework expects.

The user writes `{"kv_connector": "mcp", "kv_role": "kv_both"}`, with our settings, if any, under
`kv_connector_extra_config.mcp` (a mapping, or the path of a file). The framework reads its own keys
from the same mapping; we fill in those that the user left out. Done in every process that builds a
part of the connector, so it must be idempotent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcp_vllm.config import Config

if TYPE_CHECKING:
    from vllm.config.kv_transfer import KVTransferConfig

SETTINGS_KEY = "mcp"
# Our whole configuration as JSON, once files, flags and environment have been merged: the processes
# that get it must not merge the environment again, over the flags.
RESOLVED_KEY = "mcp_resolved"
SPEC = "MCPOffloadingSpec"
TIER = "mcp"
POLICY, POLICY_MODULE = "SmartCachePolicy", "mcp_vllm.vllm_plugin.host_policy"


def resolve(extra_config: dict[str, Any], config: Config | None = None) -> Config:
    """Our configuration; settles it for all processes on the first call, or to `config`.

    Raises:
        ConfigError: the user's settings are not valid.
    """
    if config is None and RESOLVED_KEY in extra_config:
        return Config.from_json(extra_config[RESOLVED_KEY])
    config = config or Config.load(extra_config.get(SETTINGS_KEY))
    extra_config[RESOLVED_KEY] = config.to_json()
    return config


def complete(transfer_config: KVTransferConfig) -> Config:
    """Fill in what connector `mcp` needs from the offloading framework.

    Raises:
        ConfigError: our settings are not valid.
    """
    extra = transfer_config.kv_connector_extra_config
    config = resolve(extra)
    _register_parts()
    extra.setdefault("spec_name", SPEC)
    extra.setdefault("cpu_bytes_to_use", int(config.host_cache_bytes))
    if config.host_cache_policy == "smart":
        extra.setdefault("eviction_policy", POLICY)
    if extra.get("eviction_policy") == POLICY:
        extra["cache_policy_module_path"] = POLICY_MODULE
    # A chat's next turn contains the answer to the last one: generated tokens are worth keeping.
    extra.setdefault("offload_prompt_only", False)
    tiers = extra.setdefault("secondary_tiers", [])
    if not any(tier.get("type") == TIER for tier in tiers):
        tiers.append({"type": TIER})
    # vLLM's default would fail the request; and it cannot be told apart from the user's own "fail".
    transfer_config.kv_load_failure_policy = "recompute"
    return config


def _register_parts() -> None:
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory
    from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

    if SPEC not in OffloadingSpecFactory._registry:
        OffloadingSpecFactory.register_spec(SPEC, "mcp_vllm.vllm_plugin.spec", SPEC)
    if TIER not in SecondaryTierFactory._registry:
        SecondaryTierFactory.register_tier(TIER, "mcp_vllm.vllm_plugin.tier", "ContextTier")
