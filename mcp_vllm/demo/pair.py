"""Two hosts on one machine: each an agent that runs on its own and an engine, peers of each other.

Used by the demo, the benchmarks and the integration tests. `Pair` is a context manager; whatever
happens, its processes end with it.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from mcp_vllm.client import MCPClient
from mcp_vllm.demo.engines import HOST, ContextAgent, Engine, EngineFailed, Server, free_port
from mcp_vllm.session.manifest import DEFAULT_TENANT

ENGINE_ARGS = ("--enforce-eager", "--max-model-len", "4096")
START_DEADLINE_S = 600.0
STORED_DEADLINE_S = 60.0
# An engine offers the blocks of a request within a few steps of its end.
SETTLED_S = 0.5
# Both hosts share one machine's cores: a lookup may wait longer here than between two machines, and
# what loads and prompts take together says nothing about two.
SHARED_CORES = {"agent": {"lookup_ms": 1000, "stall_ms": 5000, "load_policy": "always"}}


@dataclass
class Host:
    """One of the two hosts.

    Attributes:
        name: "A", "B", ...; in file names and tables.
        settings: the configuration that its agent and its engine share.
        environment: laid over the present one for the engine.
    """

    name: str
    folder: Path
    log_folder: Path
    settings: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    agent: ContextAgent | None = None
    engine: Engine | None = None

    @property
    def config_path(self) -> Path:
        return self.folder / f"{self.name}.yaml"

    @property
    def peer_address(self) -> str:
        return str(self.settings["agent"]["listen"])

    @property
    def agent_url(self) -> str:
        return f"http://{self.peer_address}"

    def start_agent(self) -> ContextAgent:
        """Start the agent and wait for it. Raises EngineFailed."""
        self.config_path.write_text(yaml.safe_dump(self.settings))
        port = int(self.peer_address.rsplit(":", 1)[1])
        log_path = self.log_folder / f"agent-{self.name}.log"
        self.agent = ContextAgent.start(self.config_path, port, log_path=log_path)
        self.agent.wait_ready(60)
        return self.agent

    def start_engine(self, model: Path | str, extra_args: Sequence[str] = ()) -> Engine:
        """Start the engine without waiting for it."""
        ours = ("--kv-connector", "mcp", "--mcp-config", str(self.config_path))
        self.engine = Engine.start(
            model,
            free_port(),
            [*ENGINE_ARGS, *ours, *extra_args],
            self.environment,
            log_path=self.log_folder / f"engine-{self.name}.log",
        )
        return self.engine

    @property
    def engine_url(self) -> str:
        assert self.engine is not None
        return self.engine.base_url

    def wait_until_stored(
        self, session_id: str, turns: int = 1, tenant: str = DEFAULT_TENANT
    ) -> None:
        """Until the agent has that many turns of the session, and no more blocks of it arrive.

        Raises EngineFailed when that does not come in time.
        """
        until_s = time.monotonic() + STORED_DEADLINE_S
        held = 0
        with MCPClient(self.agent_url, tenant) as client:
            while time.monotonic() < until_s:
                session = {each.session_id: each for each in client.sessions()}.get(session_id)
                if session and session.turns >= turns and 0 < session.held_chunks == held:
                    return
                held = session.held_chunks if session else 0
                time.sleep(SETTLED_S)
        raise EngineFailed(f"agent {self.name} did not take over the blocks of {session_id}")

    @property
    def servers(self) -> list[Server]:
        """The engine and the agent, those that were started."""
        return [server for server in (self.engine, self.agent) if server is not None]

    def stop(self) -> None:
        """End the engine, then the agent."""
        for server in self.servers:
            server.stop()


@dataclass
class Pair:
    """Hosts A and B. Enter it to start both agents; start the engines as needed.

    Args:
        log_folder: where the servers' output goes.
        settings: laid over both hosts' configuration, section by section.
    """

    log_folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    names: Sequence[str] = ("A", "B")
    hosts: dict[str, Host] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mcp-vllm-")))
            addresses = {name: f"{HOST}:{free_port()}" for name in self.names}
            for name in self.names:
                host = Host(name, folder, self.log_folder, self._settings(name, folder, addresses))
                stack.callback(host.stop)
                self.hosts[name] = host
                host.start_agent()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def servers(self) -> list[Server]:
        """All that was started, of all hosts."""
        return [server for host in self.hosts.values() for server in host.servers]

    def start_engines(self, model: Path | str, extra_args: Sequence[str] = ()) -> None:
        """Start the engines of all hosts side by side and wait for them. Raises EngineFailed."""
        for host in self.hosts.values():
            host.start_engine(model, extra_args)
        for host in self.hosts.values():
            assert host.engine is not None
            host.engine.wait_ready(START_DEADLINE_S)

    def _settings(self, name: str, folder: Path, addresses: Mapping[str, str]) -> dict[str, Any]:
        agent = {"socket": str(folder / f"{name}.sock"), "listen": addresses[name]}
        settings = json.loads(json.dumps(dict(self.settings)))
        settings["agent"] = {**settings.get("agent", {}), **agent}
        settings["peers"] = [address for other, address in addresses.items() if other != name]
        return settings


@contextlib.contextmanager
def running_hosts(
    model: Path | str,
    log_folder: Path | str,
    settings: Mapping[str, Any],
    names: Sequence[str] = ("A", "B"),
) -> Iterator[list[Host]]:
    """Hosts with their engines ready; all their processes end with the context."""
    with Pair(Path(log_folder), settings, names) as pair:
        pair.start_engines(model)
        yield list(pair.hosts.values())
