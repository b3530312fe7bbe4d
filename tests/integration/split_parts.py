"""Real stages as child processes, a proxy between engine and stage, and how tokens are compared."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from mcp_vllm.demo.engines import default_environment, free_port
from mcp_vllm.vllm_plugin.shared_cores import share_cores
from tests.integration.split_engine import Answer, Request, Result, Scenario, Signal
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[2]
# Engine and stage alike; small blocks and batches, so that prompts come in chunks.
BLOCK, MODEL_LEN = 32, 1024
# Two engines on two busy cores: silence means less here than on a machine of its own.
PATIENT = {"lost_ms": 5000, "step_ms": 120_000, "connect_ms": 10_000, "replan_s": 0}
NEAR_TIE = 0.01
START_S = 300.0


@dataclass
class Stage:
    process: subprocess.Popen[bytes]
    port: int
    http_port: int
    log: Path
    host: str = "127.0.0.1"

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.host, self.http_port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def metric(self, name: str) -> float:
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(each.split()[-1]) for each in lines if each.startswith(name))

    def wait_ready(self) -> None:
        wait_for(f"stage ready (see {self.log})", self._is_ready, START_S)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        with contextlib.suppress(OSError):
            return self.get("/healthz")[0] == 200
        return False


@contextlib.contextmanager
def stage_of(
    model: Path,
    layers: str,
    *options: str,
    vllm_args: Sequence[str] = ("--block-size", str(BLOCK), "--max-model-len", str(MODEL_LEN)),
    name: str = "stage",
    data_bytes: int | None = None,
    prefix: Sequence[str] = (),
    host: str = "127.0.0.1",
) -> Iterator[Stage]:
    """`mcp-vllm stage` on free ports of `host`, with so much memory; it may still be loading.
    `prefix` is put in front of its command."""
    port, http_port = free_port(), free_port()
    log = REPOSITORY / "build" / "test-logs" / f"{name}-{port}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *prefix, *_limited(data_bytes),
        sys.executable, "-m", "mcp_vllm.cli.main", "stage", str(model), "--layers", layers,
        "--listen", f"{host}:{port}", "--http", f"{host}:{http_port}",
        "--kv-bytes", "256MiB", *options, "--", *vllm_args,
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=_environment()
        )
    try:
        yield Stage(process, port, http_port, log, host)
    finally:
        process.kill()
        process.wait()


def split_of(layers: str, *stages: str, **settings: Any) -> str:
    return json.dumps({"layers": layers, "stages": stages, **PATIENT, **settings})


def engine_of(model: Path, **settings: Any) -> dict[str, Any]:
    common = {
        "model": str(model),
        "enforce_eager": True,
        "block_size": BLOCK,
        "max_model_len": MODEL_LEN,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 8,
    }
    return common | settings


@dataclass
class Played:
    result: Result | None
    log: str

    @property
    def answers(self) -> list[list[Answer]]:
        assert self.result is not None, self.log[-5000:]
        return self.result.answers

    def complaint(self) -> str:
        """The last line of an engine that did not start."""
        assert self.result is None
        return self.log.strip().splitlines()[-1]


def play(
    engine: dict[str, Any],
    *rounds: list[Request],
    signals: Sequence[Signal] = (),
    name: str = "request",
    data_bytes: int | None = None,
) -> Played:
    """One engine, from its start to its end, with so much memory."""
    with start(engine, *rounds, signals=signals, name=name, data_bytes=data_bytes) as process:
        return finish(process)


@contextlib.contextmanager
def start(
    engine: dict[str, Any],
    *rounds: list[Request],
    signals: Sequence[Signal] = (),
    name: str = "request",
    data_bytes: int | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    scenario = Scenario(engine, list(rounds), list(signals), name)
    process = subprocess.Popen(
        [*_limited(data_bytes), sys.executable, "-m", "tests.integration.split_engine"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=REPOSITORY,
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(scenario))
    process.stdin.close()
    process.stdin = None
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(process: subprocess.Popen[bytes]) -> Played:
    output, errors = process.communicate(timeout=900)
    log = errors.decode(errors="replace")
    if process.returncode != 0:
        return Played(None, log)
    return Played(msgspec.json.decode(output, type=Result), log)


def _limited(data_bytes: int | None) -> list[str]:
    """A command's beginning that lets it allocate no more than that: weights' files while they are
    read count, too."""
    return [] if data_bytes is None else ["prlimit", f"--data={data_bytes}", "--"]


def _environment() -> dict[str, str]:
    environment = os.environ | default_environment() | {"PYTHONPATH": str(REPOSITORY)}
    share_cores(environment)
    return environment


def assert_same_tokens(ours: list[Answer], reference: list[Answer]) -> None:
    """Aborted requests as far as both went."""
    for number, (a, b) in enumerate(zip(ours, reference, strict=True)):
        if a.aborted:
            length = min(len(a.tokens), len(b.tokens))
            assert a.tokens[:length] == b.tokens[:length], number
        else:
            assert a.tokens == b.tokens, number


def assert_same_or_near_tie(
    ours: list[Answer], reference: list[Answer], near_tie: float = NEAR_TIE
) -> list[str]:
    """After a recompute a greedy choice may fall otherwise where two tokens are as good as equal,
    as in vLLM itself; from there on the texts are different ones. Returns the near-ties."""
    ties = []
    for number, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert len(a.tokens) == len(b.tokens), number
        differing = [
            i for i, pair in enumerate(zip(a.tokens, b.tokens, strict=True)) if len({*pair}) > 1
        ]
        if differing:
            first = differing[0]
            gap = min(a.gaps[first], b.gaps[first])
            assert gap < near_tie, f"request {number}, token {first}: gap {gap:.3f}"
            ties.append(f"request {number}: token {first} of {len(a.tokens)}, gap {gap:.4f}")
    return ties


@dataclass
class Proxy:
    """Forwards one TCP port to another and keeps what passes.

    Attributes:
        sent, received: everything from and to the engine.
        cut_after: received bytes after which nothing passes any more, in either direction, while
            the connections stay open, as when a cable is pulled.
    """

    target: tuple[str, int]
    cut_after: int | None = None
    sent: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)

    def __enter__(self) -> Proxy:
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def is_cut(self) -> bool:
        return self.cut_after is not None and len(self.received) >= self.cut_after

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                engine, _ = self._listener.accept()
                stage = socket.create_connection(self.target)
                for pair in ((engine, stage, self.sent), (stage, engine, self.received)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 20):
                if self.is_cut:
                    continue
                kept += chunk
                sink.sendall(chunk)
            if not self.is_cut:
                sink.shutdown(socket.SHUT_WR)
