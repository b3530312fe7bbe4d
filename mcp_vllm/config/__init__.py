"""Configuration: one schema, one loader, every key documented in docs/configuration.md."""

from mcp_vllm.config.address import Address
from mcp_vllm.config.errors import ConfigError
from mcp_vllm.config.schema import (
    AgentConfig,
    CodecConfig,
    Config,
    DiscoveryConfig,
    DiskConfig,
    SecurityConfig,
    TenantsConfig,
)
from mcp_vllm.config.section import AUTO, KNOWN_CODECS

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
