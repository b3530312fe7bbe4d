"""Stand-ins for what surrounds an agent: an engine (its end of the link over real shared memory),
and peers that misbehave. Everything uses real sockets; nothing needs vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import msgspec
import numpy as np
from loopback_server import LoopbackServer

from mcp_vllm.agent import directory_wire, wire
from mcp_vllm.agent.chunk_set import hash_keys
from mcp_vllm.agent.directory_wire import Beat, Entries, Slice, Start, Whole, to_wire
from mcp_vllm.agent.peer import Following, Peer
from mcp_vllm.agent.server import Agent
from mcp_vllm.codec import ChunkLayout, encode_frame, get_codec
from mcp_vllm.codec.loss import EXACT
from mcp_vllm.config import Config
from mcp_vllm.link import protocol
from mcp_vllm.link.client import AgentLink, LinkDeadlines
from mcp_vllm.link.events import Found, JobDone
from mcp_vllm.link.prefill import PrefillCost
from mcp_vllm.link.protocol import GroupLayout
from mcp_vllm.link.shared_memory import create_memory, map_rows, reopen_read_only
from mcp_vllm.session.fingerprint import Fingerprint

PATIENCE_S = 15.0
FIELDS = {"model": "a", "dtype": "bf16"}
CHUNK_BYTES = 24 << 10
# Two groups; the second leaves a hole that belongs to somebody else.
GROUPS = (
    GroupLayout(((0, 16 << 10),), "bf16", 64),
    GroupLayout(((0, 4 << 10), (8 << 10, 4 << 10)), "bf16", 64),
)
LAYOUT = ChunkLayout("bf16", 64)
DEADLINES = LinkDeadlines(handshake_s=2.0, reconnect_min_s=0.01, reconnect_max_s=0.05)


def key(number: int, group: int = 0) -> bytes:
    return number.to_bytes(32, "big") + group.to_bytes(4, "big")


def keys(*numbers: int, group: int = 0) -> list[bytes]:
    return [key(number, group) for number in numbers]


def pattern(number: int, size: int) -> np.ndarray:
    """Compressible bytes, different for each number."""
    values = np.random.default_rng(number).normal(1, 0.1, size // 2).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def frame_of(name: bytes, raw: np.ndarray) -> bytes:
    return encode_frame(name, raw.data, LAYOUT, get_codec("raw"))


async def until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Return once `condition` holds; fail when it does not in time."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {PATIENCE_S} s for {what}"
        await asyncio.sleep(0.002)


def wait_until(condition: Callable[[], object], what: str = "the condition") -> None:
    """`until`, without an event loop."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.002)


def settings(
    *peers: str,
    codec: str = "zstd",
    codecs: Mapping[str, object] | None = None,
    tenants: Mapping[str, object] | None = None,
    **agent: object,
) -> Config:
    defaults = {
        "listen": "127.0.0.1:0",
        "landing_bytes": 1 << 20,
        "ram_bytes": 64 << 20,
        "lookup_ms": 2000,
        "stall_ms": 2000,
        "codec_threads": 2,
    }
    return Config.model_validate(
        {
            "peers": list(peers),
            "codec": {"name": codec, **(codecs or {})},
            "tenants": dict(tenants or {}),
            "agent": {**defaults, **agent},
        }
    )


RUNNING: set[Agent] = set()
TOLD_S = 2.0


async def told() -> None:
    """Return once the agents in this process know what those they follow have; soon anyway."""
    stores = {agent._context.agent_id: agent._context.store for agent in RUNNING}

    def is_told(peer: Peer) -> bool:
        store = stores.get(peer.directory.agent_id)
        following = peer.following is Following.SYNCED
        return store is None or not following or peer.directory.num_chunks == len(store)

    until_s = time.monotonic() + TOLD_S
    while time.monotonic() < until_s:
        if all(is_told(peer) for agent in RUNNING for peer in agent._peers):
            return
        await asyncio.sleep(0.002)


async def acquainted(*agents: Agent) -> None:
    """Return once none of these has a peer that it takes for dead."""
    await until(
        lambda: not any(peer.is_down for agent in agents for peer in agent._peers), "the peers"
    )


@contextlib.asynccontextmanager
async def running_agent(config: Config, socket_path: Path) -> AsyncIterator[Agent]:
    """A real agent in this event loop."""
    get_codec("lossless")  # loaded beside an agent's start, which may take longer than a lookup
    agent = Agent(config, socket_path, owned=False)
    task = asyncio.create_task(agent.run())
    try:
        await until(lambda: agent.port is not None or task.done(), "the agent to listen")
        if task.done():
            await task
        RUNNING.add(agent)
        yield agent
    finally:
        RUNNING.discard(agent)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def address(agent: Agent) -> str:
    return f"127.0.0.1:{agent.port}"


async def get(agent: Agent, path: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"http://{address(agent)}{path}") as response,
    ):
        return response.status, await response.text()


async def get_json(agent: Agent, path: str) -> Any:
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"http://{address(agent)}{path}") as response,
    ):
        return await response.json()


def metric(agent: Agent, name: str, **labels: str) -> float:
    return agent._context.metrics.registry.get_sample_value(name, labels) or 0.0


class SimulatedEngine:
    """What vLLM's scheduler does with the link, and the host chunks that its workers fill."""

    def __init__(
        self,
        socket_path: Path | str,
        fields: dict[str, str] = FIELDS,
        groups: Sequence[GroupLayout] = GROUPS,
        num_chunks: int = 32,
        chunk_bytes: int = CHUNK_BYTES,
        deadlines: LinkDeadlines = DEADLINES,
        before_connect: Callable[[], None] = lambda: None,
    ) -> None:
        self._fd = create_memory("host", num_chunks * chunk_bytes)
        self._mapped = map_rows(self._fd, num_chunks, chunk_bytes, writable=True)
        self.rows = self._mapped.rows
        self._read_fd = reopen_read_only(self._fd)
        self.hello = protocol.Hello(
            protocol.PROTOCOL_VERSION, "sim", os.getpid(), fields, chunk_bytes, num_chunks,
            list(groups),
        )  # fmt: skip
        self.link = AgentLink(
            str(socket_path),
            lambda: self.hello,
            self._read_fd,
            self.rows,
            before_connect,
            deadlines=deadlines,
        )
        self.events: list[Found | JobDone] = []
        # What the agent says that it has, by tenant.
        self.inventory: dict[str, set[bytes]] = {}
        self._next_id = 0

    def __enter__(self) -> SimulatedEngine:
        self.link.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.link.stop()
        os.close(self._fd)
        os.close(self._read_fd)

    async def connected(self) -> SimulatedEngine:
        await until(lambda: self.link.connected, "the engine to connect")
        return self

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def take(self, kind: type, number: int) -> Found | JobDone | None:
        """The event of that lookup or job, if it has come."""
        for event in self.link.poll():
            if isinstance(event, Found | JobDone):
                self.events.append(event)
            elif isinstance(event, protocol.Inventory):
                held = self.inventory.setdefault(event.tenant, set())
                held.update(event.added)
                held.difference_update(event.removed)
        for event in self.events:
            name = event.lookup_id if isinstance(event, Found) else event.job_id
            if isinstance(event, kind) and name == number:
                self.events.remove(event)
                return event
        return None

    async def told_of(self, tenant: str, names: Iterable[bytes]) -> None:
        """Wait until the agent has told of exactly these: it gathers changes before it does."""
        expected = set(names)
        await until(lambda: self._inventory_of(tenant) == expected, f"the inventory of {tenant}")

    def _inventory_of(self, tenant: str) -> set[bytes]:
        self.take(JobDone, 0)
        return self.inventory.get(tenant, set())

    async def event(self, kind: type, number: int):  # type: ignore[no-untyped-def]
        found = []
        await until(lambda: found or found.extend(filter(None, [self.take(kind, number)])), "event")
        return found[0]

    def fill(self, chunk_id: int, number: int) -> None:
        self.rows[chunk_id] = pattern(number, self.rows.shape[1])

    async def store(
        self,
        names: Sequence[bytes],
        chunk_ids: Sequence[int],
        loss: str = EXACT,
        tenant: str = "default",
    ) -> JobDone:
        job_id = self.new_id()
        self.link.send(protocol.Store(job_id, list(names), list(chunk_ids), loss, tenant=tenant))
        return await self.event(JobDone, job_id)

    def prepare(
        self,
        request_id: str,
        session_id: str | None = None,
        tenant: str = "default",
        salted: bool = False,
        prefill: PrefillCost | None = None,
    ) -> None:
        self.link.send(protocol.Prepare(request_id, tenant, session_id, salted, prefill))

    async def lookup(
        self,
        request_id: str,
        names: Sequence[bytes],
        tenant: str = "default",
        whole: bool = False,
    ) -> list[int]:
        await told()
        lookup_id = self.new_id()
        self.link.send(protocol.Lookup(lookup_id, request_id, list(names), tenant, whole))
        return list((await self.event(Found, lookup_id)).present)

    async def finds(self, request_id: str, names: Sequence[bytes], tenant: str = "default") -> None:
        """Look up until all of them are found: what a peer has is known a moment later."""
        deadline_s = time.monotonic() + PATIENCE_S
        while (found := await self.lookup(request_id, names, tenant)) != [1] * len(names):
            assert time.monotonic() < deadline_s, f"found {found}"
            await asyncio.sleep(0.02)

    async def load(
        self,
        request_id: str,
        names: Sequence[bytes],
        chunk_ids: Sequence[int],
        tenant: str = "default",
        ends: Sequence[int] = (),
    ) -> JobDone:
        job_id = self.new_id()
        load = protocol.Load(job_id, request_id, list(names), tenant, list(ends))
        self.link.load(load, list(chunk_ids))
        return await self.event(JobDone, job_id)

    def payload(self, chunk_id: int, group: int = 0) -> bytes:
        """The bytes of that host chunk that belong to the group."""
        row = self.rows[chunk_id]
        return b"".join(row[o : o + n].tobytes() for o, n in self.hello.groups[group].spans)


Answer = Callable[[list[bytes], asyncio.StreamWriter], Awaitable[None]]
Directory = Callable[[asyncio.StreamWriter], Awaitable[None]]


class SimulatedPeer:
    """A peer written from the protocol alone, so that it can break it anywhere.

    Without `directory` it is an agent that has none.
    """

    def __init__(self, lookup: Answer, fetch: Answer, directory: Directory | None = None) -> None:
        self._lookup, self._fetch = lookup, fetch
        self._directory = directory or has_no_directory
        self.fetched: list[list[bytes]] = []
        self.followed: list[tuple[str, int]] = []
        self.lookups = 0
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> SimulatedPeer:
        server = await self._stack.enter_async_context(LoopbackServer(self._serve).running())
        self.name = server.address
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            size = int(head.partition("content-length:")[2].partition("\r\n")[0] or 0)
            asked = msgspec.msgpack.decode(await reader.readexactly(size)) if size else {}
            path = head.partition("\r\n")[0]
            if "directory" in path:
                self.followed.append((asked["agent_id"], asked["seq"]))
                await self._directory(writer)
            elif "healthz" in path:
                http_head(writer)
            elif "lookup" in path:
                self.lookups += 1
                await self._lookup(asked["keys"], writer)
            else:
                self.fetched.append(asked["keys"])
                await self._fetch(asked["keys"], writer)
            await writer.drain()
        writer.close()


def http_head(writer: asyncio.StreamWriter, status: str = "200 OK") -> None:
    writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n".encode())


async def has_no_directory(writer: asyncio.StreamWriter) -> None:
    http_head(writer, "404 Not Found")


def announces(
    *names: bytes, agent_id: str = "simulated", then: Directory | None = None
) -> Directory:
    """The directory of an agent that has these chunks and lives on; `then` comes before that."""

    async def directory(writer: asyncio.StreamWriter) -> None:
        http_head(writer)
        entries = [Entries(Fingerprint(FIELDS).digest, [to_wire(hash_keys(names))])]
        for message in (Start(agent_id, 0, False), Slice(entries), Whole(0, len(names))):
            writer.write(directory_wire.pack(message))
        await writer.drain()
        if then is not None:
            await then(writer)
        while True:
            writer.write(directory_wire.pack(Beat(0)))
            await writer.drain()
            await asyncio.sleep(0.3)

    return directory


async def has_all(asked: list[bytes], writer: asyncio.StreamWriter) -> None:
    http_head(writer)
    writer.write(wire.encode(wire.LookupReply(b"\x01" * len(asked))))


def has_all_but(*absent: bytes) -> Answer:
    async def answer(asked: list[bytes], writer: asyncio.StreamWriter) -> None:
        http_head(writer)
        writer.write(wire.encode(wire.LookupReply(bytes(name not in absent for name in asked))))

    return answer


async def never(asked: list[bytes], writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


def send_frame(writer: asyncio.StreamWriter, index: int, frame: bytes) -> None:
    writer.write(wire.FRAME_HEAD.pack(index, 0, 0, len(frame)) + frame)


def good_frame(name: bytes) -> bytes:
    """The frame of a group-0 chunk as every honest holder has it."""
    return frame_of(name, pattern(int.from_bytes(name[:32], "big"), CHUNK_BYTES)[: 16 << 10])


async def sends_all(asked: list[bytes], writer: asyncio.StreamWriter) -> None:
    http_head(writer)
    for index, name in enumerate(asked):
        send_frame(writer, index, good_frame(name))
    send_frame(writer, wire.END_INDEX, b"")
