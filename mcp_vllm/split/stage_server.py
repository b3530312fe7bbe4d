"""A stage's side of the protocol: connections, refusals, and one lease for each engine.

Two threads a connection. The lease's thread receives and does the work, one message after the
other; the other one answers pings while layers compute or load. What the layers are is the
backend's business; whatever goes wrong in one lease ends that lease with one Error message, and
touches no other.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec
import torch

from mcp_vllm.session.fingerprint import Fingerprint
from mcp_vllm.split import wire
from mcp_vllm.split.access import Access, AccessDenied
from mcp_vllm.split.activations import DTYPES, FORMS, Activations, Form
from mcp_vllm.split.channel import Channel, Message, Patience, expect, tune
from mcp_vllm.split.errors import SplitError, StageLost, StageRefused, WireError
from mcp_vllm.split.inbox import Inbox
from mcp_vllm.split.memory import is_out_of_memory
from mcp_vllm.split.wire import (
    Acts,
    Hello,
    Kind,
    KvBlocks,
    KvInit,
    KvPlan,
    Step,
    StepSeconds,
    Welcome,
)
from mcp_vllm.telemetry.stage_metrics import StageMetrics

logger = logging.getLogger(__name__)

HELLO_S = 10.0
# So often the other thread looks for what has come while layers compute.
LOOK_S = 0.02
# Connections that have not said Hello yet; more wait in the kernel's queue.
MAX_STRANGERS = 32

Rows = tuple[list[int], Activations]
# Waits for the order of a step's rows and the rows. What it is given it calls when they are there
# and still have to be decoded.
Take = Callable[[Callable[[], None]], Rows]


class Lease(Protocol):
    """One engine's state at the stage; used by one thread."""

    welcome: Welcome

    def init_kv(self, kv_init: KvInit) -> KvPlan | None:
        """Allocate the blocks; of a client's lease, plan them, too.

        Raises StageRefused: too many, or not what these layers have."""

    def run(self, step: Step, take: Take, computed: Callable[[], None]) -> Activations:
        """Run a step. Calls `computed` when the layers are through, and their result still has to
        be put into order. Raises StageRefused."""

    def settle(self, step: Step) -> None:
        """Take note of a step in which nothing runs. Raises StageRefused."""

    def read_kv(self, wanted: KvBlocks) -> memoryview:
        """Their pages, [layer, block, byte]. Raises StageRefused."""

    def write_kv(self, given: KvBlocks, pages: bytearray) -> None:
        """Put pages into these blocks. Raises StageRefused."""

    def layer_seconds(self) -> list[float]:
        """What each layer took in the last step; only of a lease that measures."""

    def close(self) -> None:
        """Give everything back."""


class Backend(Protocol):
    """The layers."""

    dtype: torch.dtype
    device: torch.device

    def facts(self) -> Mapping[str, str]:
        """What must agree with the engine's; waits until the weights are loaded."""

    def open(self, hello: Hello) -> Lease:
        """A lease, once `facts` has returned. Raises StageRefused."""


class StageServer:
    """Listens from the start; `serve` returns after `stop`."""

    def __init__(
        self, listen: tuple[str, int], backend: Backend, access: Access, metrics: StageMetrics
    ) -> None:
        """Raises OSError: the address cannot be had."""
        family = socket.AF_INET6 if ":" in listen[0] else socket.AF_INET
        self._listener = socket.create_server(listen, family=family)
        self._backend = backend
        self._access = access
        self._metrics = metrics
        self._strangers = threading.BoundedSemaphore(MAX_STRANGERS)
        self._channels: set[Channel] = set()
        self._stopping = False

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def serve(self) -> None:
        """Accept connections until `stop`."""
        while not self._stopping:
            try:
                connected, address = self._listener.accept()
            except OSError:
                if self._stopping:
                    return
                logger.exception("accepting a connection failed")
                time.sleep(0.1)
                continue
            self._strangers.acquire()
            threading.Thread(
                target=self._greet, args=(connected, f"{address[0]}:{address[1]}"), daemon=True
            ).start()

    def stop(self) -> None:
        """Say Bye to all engines, and let `serve` return."""
        self._stopping = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # closing alone would not wake `accept`
        self._listener.close()
        for channel in list(self._channels):
            with contextlib.suppress(SplitError):
                channel.send(Kind.BYE, patience=Patience(silence_s=1.0))
            channel.close()

    def _greet(self, connected: socket.socket, peer: str) -> None:
        """Until Hello is accepted or refused; then look after the connection."""
        try:
            try:
                connected.settimeout(HELLO_S)
                tune(connected)
                secured = self._access.secure(connected)
            except OSError as error:
                connected.close()
                self._refused(peer, "access", f"no TLS: {error}")
                return
            channel = Channel(secured)
            try:
                hello = self._hello(channel, secured)
            except SplitError as error:
                self._end(channel, peer, error)
                return
        finally:
            self._strangers.release()
        self._attend(channel, hello, peer)

    def _hello(self, channel: Channel, connected: socket.socket) -> Hello:
        patience = Patience(silence_s=HELLO_S, total_s=HELLO_S)
        hello = wire.decode(Hello, expect(channel.receive(patience), Kind.HELLO).metadata)
        try:
            self._access.check(connected, hello.token)
        except AccessDenied as error:
            raise StageRefused("", "access", str(error)) from error
        _check_bounds(hello)
        return hello

    def _attend(self, channel: Channel, hello: Hello, peer: str) -> None:
        """Let the lease's thread work until the connection ends, and look after it meanwhile."""
        self._channels.add(channel)
        inbox = Inbox(channel)
        worker = _LeaseThread(self._backend, hello, channel, inbox, self._metrics)
        channel.max_metadata = wire.MAX_METADATA_BYTES
        thread = threading.Thread(target=worker.run, args=(peer, self._end), daemon=True)
        thread.start()
        logger.info("engine %s has connected", peer)
        try:
            while thread.is_alive():
                inbox.look()
                thread.join(LOOK_S)
        finally:
            self._channels.discard(channel)

    def _end(self, channel: Channel, peer: str, error: Exception) -> None:
        """Tell the engine why, if it is there, and close."""
        code, text = _refusal(error)
        if not isinstance(error, StageLost):
            self._refused(peer, code, text)
            with contextlib.suppress(SplitError):
                patience = Patience(silence_s=1.0)
                channel.send(Kind.ERROR, wire.Error(code, text), patience=patience)
        channel.close()

    def _refused(self, peer: str, code: str, text: str) -> None:
        self._metrics.refusals.labels(code).inc()
        logger.warning("engine %s is refused (%s): %s", peer, code, text)


class _LeaseThread:
    """One lease from Welcome to the end."""

    def __init__(
        self,
        backend: Backend,
        hello: Hello,
        channel: Channel,
        inbox: Inbox,
        metrics: StageMetrics,
    ) -> None:
        self._backend = backend
        self._hello = hello
        self._channel = channel
        self._inbox = inbox
        self._metrics = metrics

    def run(self, peer: str, end: Callable[[Channel, str, Exception], None]) -> None:
        lease: Lease | None = None
        try:
            facts = self._backend.facts()
            if not self._hello.measuring:
                _check_facts(facts, self._hello)
            lease = self._backend.open(self._hello)
            self._metrics.leases.inc()
            self._serve(lease)
        except Exception as error:
            if not isinstance(error, SplitError):
                logger.exception("the lease of engine %s has failed", peer)
            end(self._channel, peer, error)
        finally:
            if lease is not None:
                lease.close()
                self._metrics.leases.dec()
                logger.info("the lease of engine %s has ended", peer)
            self._channel.close()

    def _serve(self, lease: Lease) -> None:
        welcome = lease.welcome
        dtype = DTYPES.get(self._hello.dtype, self._backend.dtype)
        form = Form(self._hello.form, welcome.width, dtype, "residual" in welcome.tensors)
        self._channel.max_payload = form.payload_bytes(self._hello.max_tokens)
        self._channel.max_kv_payload = wire.MAX_KV_BYTES
        self._channel.shares_cores = welcome.shares_cores
        self._channel.send(Kind.WELCOME, welcome)
        kv_init = wire.decode(KvInit, expect(self._inbox.take(), Kind.KV_INIT).metadata)
        self._channel.send(Kind.OK, lease.init_kv(kv_init))
        number = 0
        while True:
            number += 1
            message = expect(self._take_beside_kv(lease), Kind.STEP, number)
            step = wire.decode(Step, message.metadata)
            if not step.scheduled:
                lease.settle(step)
                continue
            self._run_step(lease, form, number, step)

    def _run_step(self, lease: Lease, form: Form, number: int, step: Step) -> None:
        started = 0.0

        def take(arrived: Callable[[], None]) -> Rows:
            nonlocal started
            message = expect(self._take_beside_kv(lease), Kind.ACTS, number)
            started = time.perf_counter()
            arrived()
            order = wire.decode(Acts, message.metadata).order
            rows = form.decode(message.payload, step.num_tokens, self._backend.device)
            return order, rows.to(self._backend.dtype)

        rows = lease.run(step, take, computed=self._channel.announce)
        payload = form.encode(rows.to(form.dtype))
        seconds = time.perf_counter() - started
        layers = lease.layer_seconds() if self._hello.measuring else []
        self._channel.send(Kind.REPLY, StepSeconds(seconds, layers), payload, number)
        self._metrics.steps.inc()
        self._metrics.tokens.inc(step.num_tokens)
        self._metrics.step_seconds.observe(time.perf_counter() - started)

    def _take_beside_kv(self, lease: Lease) -> Message:
        """The next message that is not about KV blocks; such are answered here."""
        while True:
            message = self._inbox.take()
            if message.kind == Kind.READ_KV:
                pages = lease.read_kv(wire.decode(KvBlocks, message.metadata))
                self._channel.send(Kind.KV, payload=[pages])
            elif message.kind == Kind.WRITE_KV:
                lease.write_kv(wire.decode(KvBlocks, message.metadata), message.payload)
                self._channel.send(Kind.OK)
            else:
                return message


def _check_facts(ours: Mapping[str, str], hello: Hello) -> None:
    who = "the engine"
    if hello.is_client:
        who = "the client"
        ours = {name: value for name, value in ours.items() if name in hello.facts}
    difference = Fingerprint(ours).first_difference(Fingerprint(hello.facts))
    if difference is not None:
        raise StageRefused("", "model", f"not what this stage holds: {difference} ({who})")


def _check_bounds(hello: Hello) -> None:
    if hello.form not in FORMS:
        raise StageRefused("", "protocol", f"unknown form of activations {hello.form[:20]!r}")
    if hello.dtype not in ("", *DTYPES):
        raise StageRefused("", "protocol", f"unknown dtype {hello.dtype[:20]!r}")
    for name, value, most in (
        ("max_model_len", hello.max_model_len, wire.MAX_MODEL_LEN),
        ("max_requests", hello.max_requests, wire.MAX_REQUESTS),
        ("max_tokens", hello.max_tokens, wire.MAX_BATCH_TOKENS),
    ):
        if not 1 <= value <= most:
            raise StageRefused("", "protocol", f"{name} {value} is not from 1 to {most}")


def _refusal(error: Exception) -> tuple[str, str]:
    """Code and text for the other side; nothing of our insides."""
    if isinstance(error, StageRefused):
        return error.code, error.reason
    if isinstance(error, WireError | msgspec.ValidationError):
        return "protocol", str(error)
    if isinstance(error, StageLost):
        return "protocol", str(error)
    if is_out_of_memory(error):
        return "memory", "the stage is out of memory"
    return "internal", f"the step failed ({type(error).__name__}); the stage's log has more"
