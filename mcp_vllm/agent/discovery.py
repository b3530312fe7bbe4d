"""Finds peers while serving: the addresses of DNS names, and a registry where agents write theirs.

One task, started by `server` once the agent listens. A source that fails keeps its last members:
those that are gone are down by their links and cost nothing. Runs in the agent's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence

from mcp_vllm.agent.peer_http import Member
from mcp_vllm.agent.peers import Peers
from mcp_vllm.agent.registry import Registry
from mcp_vllm.config import Address, Config
from mcp_vllm.telemetry.agent_metrics import AgentMetrics

logger = logging.getLogger(__name__)

# A registry hears from an agent so often within the time after which it forgets it.
BEATS_IN_TTL = 4
LEAVE_S = 1.0

Source = Callable[[], Awaitable[Sequence[Member]]]


class Discovery:
    """The sources of one agent.

    Args:
        agent_id: of this agent.
        port: where it listens.
    """

    def __init__(
        self, config: Config, agent_id: str, port: int, peers: Peers, metrics: AgentMetrics
    ) -> None:
        """Raises RedisSetupError when the registry cannot be used at all."""
        self._config = config.discovery
        self._peers = peers
        self._metrics = metrics
        self._registry: Registry | None = None
        if self._config.registry is not None:
            own = self._config.advertise or Address(Address.parse(config.agent.listen).host, port)
            self._registry = Registry(self._config, agent_id, str(own))

    async def run(self) -> None:
        """For ever; leaves the registry when it is cancelled."""
        names = [Address.parse(text) for text in self._config.dns]
        try:
            async with asyncio.TaskGroup() as tasks:
                for name in names:
                    source = Resolver(name).members
                    tasks.create_task(self._follow(f"dns {name}", source, self._config.dns_s))
                if self._registry is not None:
                    every_s = self._config.registry_ttl_s / BEATS_IN_TTL
                    tasks.create_task(self._follow("registry", self._registry.beat, every_s))
        finally:
            if self._registry is not None:
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(LEAVE_S):
                        await self._registry.leave()

    async def _follow(self, name: str, source: Source, every_s: float) -> None:
        """Ask the source again and again, and let the peers be what it says."""
        kind, failing = name.partition(" ")[0], False
        while True:
            try:
                self._peers.set_members(name, await source())
            except Exception as error:
                self._metrics.discovery_failures.labels(kind).inc()
                if not failing:
                    detail = str(error) or type(error).__name__
                    logger.warning("discovery by %s: %s; the members stay", name, detail)
                failing = True
            else:
                if failing:
                    logger.info("discovery by %s works again", name)
                failing = False
            await asyncio.sleep(every_s)


class Resolver:
    """All addresses of one name."""

    def __init__(self, name: Address) -> None:
        self._name = name

    async def members(self) -> Sequence[Member]:
        """Raises OSError when the name cannot be resolved."""
        found = await asyncio.get_running_loop().getaddrinfo(
            self._name.host, self._name.port, type=socket.SOCK_STREAM
        )
        # Addresses come and go: certificates name the service.
        hosts = sorted({str(address[0]) for *_, address in found})
        return [Member(str(Address(host, self._name.port)), self._name.host) for host in hosts]
