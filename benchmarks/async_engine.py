"""An engine's end of the link to an agent, without vLLM: many requests at once in one event loop.

Speaks `mcp_vllm.link.protocol` over the real socket and the real shared memory; what lands is
compared with what was stored. Used by `directory_load.py`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mcp_vllm.link import protocol
from mcp_vllm.link.protocol import LENGTH, GroupLayout
from mcp_vllm.link.shared_memory import (
    create_memory,
    map_rows,
    receive_with_fd,
    reopen_read_only,
    send_with_fd,
)

FIELDS = {"model": "none", "dtype": "bf16"}
HANDSHAKE_S = 10.0


def content(key: bytes, size: int) -> np.ndarray:
    """The bytes of that chunk, on every host: uint8, shape (size,)."""
    seed = np.frombuffer(key[:8], dtype=np.uint64)
    words = np.arange(size // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
    return words.view(np.uint8)


class AsyncEngine:
    """One engine; `connect` first.

    Attributes:
        wrong: chunks that landed with other bytes than were stored.
        failed: chunks that were promised and not brought, by cause.
    """

    def __init__(self, socket_path: Path, chunk_bytes: int, num_chunks: int = 64) -> None:
        self.chunk_bytes = chunk_bytes
        self.wrong = 0
        self.failed: dict[str, int] = {}
        self._path = socket_path
        self._fd = create_memory("load", num_chunks * chunk_bytes)
        self._host = map_rows(self._fd, num_chunks, chunk_bytes, writable=True)
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for chunk_id in range(num_chunks):
            self._free.put_nowait(chunk_id)
        self._next_id = 0
        self._answers: dict[int, asyncio.Future[tuple[protocol.AgentMessage, float]]] = {}
        self._loads: dict[int, Sequence[bytes]] = {}

    async def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self._path))
        group = GroupLayout(((0, self.chunk_bytes),), "bf16", 64)
        rows = len(self._host.rows)
        hello = protocol.Hello(
            protocol.PROTOCOL_VERSION, "load", os.getpid(), FIELDS, self.chunk_bytes, rows, [group]
        )
        read_only = reopen_read_only(self._fd)
        send_with_fd(sock, protocol.pack(hello), read_only)
        os.close(read_only)
        sock.settimeout(HANDSHAKE_S)
        body, landing_fd = await asyncio.to_thread(receive_with_fd, sock, HANDSHAKE_S)
        welcome = protocol.unpack_agent(body)
        assert isinstance(welcome, protocol.Welcome), welcome
        assert landing_fd is not None
        self._landing = map_rows(
            landing_fd, welcome.num_slots, welcome.slot_bytes, writable=False
        ).rows
        os.close(landing_fd)
        sock.setblocking(False)
        self._reader, self._writer = await asyncio.open_connection(sock=sock)
        self._reading = asyncio.create_task(self._read())

    async def close(self) -> None:
        self._reading.cancel()
        self._writer.close()
        os.close(self._fd)

    def send(self, *messages: protocol.EngineMessage) -> None:
        self._writer.write(b"".join(map(protocol.pack, messages)))

    async def store(self, keys: Sequence[bytes]) -> None:
        chunk_ids = [await self._free.get() for _ in keys]
        for key, chunk_id in zip(keys, chunk_ids, strict=True):
            self._host.rows[chunk_id] = content(key, self.chunk_bytes)
        job_id, answer = self._asked()
        self.send(protocol.Store(job_id, list(keys), chunk_ids))
        await answer
        self.send(protocol.Commit(job_id))
        for chunk_id in chunk_ids:
            self._free.put_nowait(chunk_id)

    async def lookup(self, request_id: str, keys: Sequence[bytes]) -> tuple[bytes, float]:
        """The flags, and seconds from the question to the answer's arrival."""
        (answer,) = await self.lookups([(request_id, keys)])
        return answer

    async def lookups(
        self, questions: Sequence[tuple[str, Sequence[bytes]]]
    ) -> list[tuple[bytes, float]]:
        """The same for many in one write."""
        asked = [self._asked() for _ in questions]
        messages = [
            protocol.Lookup(lookup_id, request_id, list(keys))
            for (lookup_id, _), (request_id, keys) in zip(asked, questions, strict=True)
        ]
        begun_s = time.perf_counter()
        self.send(*messages)
        found = []
        for _, answer in asked:
            message, arrived_s = await answer
            assert isinstance(message, protocol.Found)
            found.append((message.present, arrived_s - begun_s))
        return found

    async def load(self, request_id: str, keys: Sequence[bytes]) -> protocol.Loaded:
        job_id, answer = self._asked()
        self._loads[job_id] = keys
        self.send(protocol.Load(job_id, request_id, list(keys)))
        loaded, _ = await answer
        assert isinstance(loaded, protocol.Loaded)
        del self._loads[job_id]
        for _ in loaded.failed:
            cause = loaded.causes[0] if loaded.causes else "?"
            self.failed[cause] = self.failed.get(cause, 0) + 1
        return loaded

    def _asked(self) -> tuple[int, asyncio.Future[tuple[protocol.AgentMessage, float]]]:
        self._next_id += 1
        self._answers[self._next_id] = asyncio.get_running_loop().create_future()
        return self._next_id, self._answers[self._next_id]

    async def _read(self) -> None:
        try:
            while True:
                size = protocol.body_size(await self._reader.readexactly(LENGTH.size))
                message = protocol.unpack_agent(await self._reader.readexactly(size))
                self._take(message, time.perf_counter())
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(ConnectionError(f"the agent went away: {error}"))

    def _take(self, message: protocol.AgentMessage, arrived_s: float) -> None:
        match message:
            case protocol.Landed(job_id, slots):
                for index, slot in slots:
                    expected = content(self._loads[job_id][index], self.chunk_bytes)
                    landed = self._landing[slot][: self.chunk_bytes]
                    self.wrong += not np.array_equal(landed, expected)
                self.send(protocol.Release([slot for _, slot in slots]))
            case protocol.Found(lookup_id):
                self._answers.pop(lookup_id).set_result((message, arrived_s))
            case protocol.Stored(job_id) | protocol.Loaded(job_id):
                self._answers.pop(job_id).set_result((message, arrived_s))
