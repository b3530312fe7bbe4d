"""Configuration: one schema, one loader, every key documented in docs/configuration.md."""

from mcp_vllm.config.address import Address
from mcp_vllm.config.errors import ConfigError
from mcp_vllm.config.schema import (
    AUTO,
    KNOWN_CODECS,
    AgentConfig,
    CodecConfig,
    Config,
    DiscoveryConfig,
    DiskConfig,
    SecurityConfig,
    TenantsConfig,
)

__all__ = [
    "AUTO",
    "KNOWN_CODECS",
    "Address",
    "AgentConfig",
    "CodecConfig",
    "Config",
    "ConfigError",
    "DiscoveryConfig",
    "DiskConfig",
    "SecurityConfig",
    "TenantsConfig",
]
