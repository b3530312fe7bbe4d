"""The agent's use of a shared store: opening the tier as configured."""

from __future__ import annotations

from collections.abc import Callable

from mcp_vllm.config import AgentConfig
from mcp_vllm.store.ram import ChunkKey
from mcp_vllm.store.shared import SharedTier, open_redis
from mcp_vllm.store.shared.tier import Limits


def open_shared(
    config: AgentConfig, may_lie_there: Callable[[ChunkKey, str], bool]
) -> SharedTier | None:
    """The tier that is configured; None: none is. Does not connect yet.

    Raises:
        RedisSetupError: it cannot be used as configured.
    """
    shared = config.shared
    if shared.url is None:
        return None
    answer_s = config.lookup_ms / 1000
    client = open_redis(
        shared.url,
        shared.password_file,
        config.stall_ms / 1000,
        key="agent.shared.url",
        password_key="agent.shared.password_file",
    )
    limits = Limits(shared.ttl_s, shared.max_frame_bytes, shared.queue_bytes, answer_s)
    return SharedTier(client, limits, may_lie_there)
