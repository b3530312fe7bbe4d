"""A tier that many hosts share: frames in a Redis or Valkey server."""

from mcp_vllm.store.shared.client import RedisSetupError, open_redis
from mcp_vllm.store.shared.tier import SharedTier

__all__ = ["RedisSetupError", "SharedTier", "open_redis"]
