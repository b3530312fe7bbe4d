"""A list of agents in Redis or Valkey: each writes where it is and reads where the others are.

One sorted set a group, `mcp_vllm:GROUP:agents`: members are "AGENT_ID ADDRESS", the score is when
the entry ends, by the server's clock. So no agent's clock matters, nothing is scanned, and what is
not renewed disappears. Everything that is read is untrusted. Used by `discovery`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mcp_vllm.agent.peer_http import Member
from mcp_vllm.config import Address, DiscoveryConfig
from mcp_vllm.store.shared import open_redis

if TYPE_CHECKING:
    from redis.asyncio import Redis

logger = logging.getLogger(__name__)

ANSWER_S = 2.0
MAX_ENTRIES = 1024
MAX_ENTRY_BYTES = 512


class Registry:
    """One agent's place in the list.

    Args:
        agent_id: tells the agent's own entry from the others.
        address: "HOST:PORT" at which the others reach it.
    """

    def __init__(self, config: DiscoveryConfig, agent_id: str, address: str) -> None:
        """Raises RedisSetupError. Does not connect yet."""
        self._key = f"mcp_vllm:{config.group}:agents"
        self._ttl_s = config.registry_ttl_s
        self._own = f"{agent_id} {address}".encode()
        self._client = _client(config)
        self._strange: set[bytes] = set()

    async def beat(self) -> Sequence[Member]:
        """Renew our entry; returns the others. Raises RedisError or OSError."""
        seconds, microseconds = await self._client.time()
        now_s = seconds + microseconds / 1e6
        async with self._client.pipeline(transaction=True) as steps:
            steps.zadd(self._key, {self._own: now_s + self._ttl_s})
            steps.zremrangebyscore(self._key, "-inf", now_s)
            steps.expire(self._key, 2 * self._ttl_s)
            steps.zrange(self._key, 0, MAX_ENTRIES - 1)
            *_, entries = await steps.execute()
        members = [self._member(entry) for entry in entries if entry != self._own]
        return [member for member in members if member is not None]

    async def others(self) -> Sequence[Member]:
        """The agents that are listed, and nothing is written. Raises RedisError or OSError."""
        entries: list[Any] = await self._client.zrange(self._key, 0, MAX_ENTRIES - 1)
        members = [self._member(entry) for entry in entries if entry != self._own]
        return [member for member in members if member is not None]

    async def leave(self) -> None:
        """Take our entry away, and close the connection."""
        try:
            await self._client.zrem(self._key, self._own)
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        await self._client.aclose()

    def _member(self, entry: bytes) -> Member | None:
        """Whose entry it is; None, and a line in the log, for what no agent has written."""
        try:
            if len(entry) > MAX_ENTRY_BYTES:
                raise ValueError("too long")
            address = Address.parse(entry.decode("ascii").partition(" ")[2])
            if address.port == 0:
                raise ValueError("no port")
        except ValueError as error:
            if len(self._strange) < MAX_ENTRIES and entry[:MAX_ENTRY_BYTES] not in self._strange:
                self._strange.add(entry[:MAX_ENTRY_BYTES])
                logger.warning("an entry of the registry is no agent's: %.80r (%s)", entry, error)
            return None
        return Member(str(address))


def _client(config: DiscoveryConfig) -> Redis:
    assert config.registry is not None
    return open_redis(
        config.registry,
        config.registry_password_file,
        ANSWER_S,
        key="discovery.registry",
        password_key="discovery.registry_password_file",
    )
