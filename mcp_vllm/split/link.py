"""The engine's connection to a stage, and the choice of the next one when it is lost.

Owned by the engine's one thread; nothing happens between calls.
"""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec
import torch

from mcp_vllm.config.address import Address
from mcp_vllm.config.split import SplitConfig
from mcp_vllm.security.tls import client_context
from mcp_vllm.security.tokens import read_token
from mcp_vllm.split import spans, wire
from mcp_vllm.split.activations import Activations, Form
from mcp_vllm.split.channel import Channel, Message, Patience, connect, expect
from mcp_vllm.split.errors import SplitError, StageLost, StageRefused, WireError
from mcp_vllm.split.same_cores import name_cores
from mcp_vllm.split.spans import Span
from mcp_vllm.split.wire import Acts, Hello, Kind, KvBlocks, KvInit, Step, StepSeconds, Welcome

logger = logging.getLogger(__name__)

# While a stage loads, its connection threads may wait for the interpreter: ask less impatiently.
_LOAD_SILENCE_S = 30.0
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Answer:
    """Rows [tokens, width] after the stage's layers, and the seconds that it needed for them."""

    activations: Activations
    stage_s: float


@dataclass(frozen=True)
class Link:
    """A lease at one stage, welcomed.

    Attributes:
        stage: HOST:PORT.
        welcome: what the stage has said.
        form: of activations on this link.
        patience: with a step's answer.
    """

    stage: str
    welcome: Welcome
    form: Form
    channel: Channel
    patience: Patience

    def init_kv(self, kv_init: KvInit, patience_s: float) -> bytearray:
        """Let the stage allocate its blocks; what it has planned (KvPlan), for a client.

        Raises StageLost, StageRefused."""
        waiting = replace(self.patience, silence_s=_LOAD_SILENCE_S, total_s=patience_s)
        self.channel.send(Kind.KV_INIT, kv_init, patience=self.patience)
        return self._receive(Kind.OK, 0, waiting).metadata

    def begin(self, number: int, step: Step) -> None:
        """Send what the step is about, so that the stage can prepare. Raises StageLost."""
        try:
            unasked = self.channel.poll(self.patience)
        except WireError as error:
            raise StageLost(str(error)) from error
        if unasked is not None:
            raise StageLost(_unasked(unasked))
        self.channel.send(Kind.STEP, step, step=number, patience=self.patience)

    def announce(self) -> None:
        """Let a stage that shares our cores wake while the step's activations are encoded.

        Raises StageLost.
        """
        self.channel.announce(self.patience)

    def run(
        self,
        number: int,
        order: list[int],
        activations: Activations,
        arrived: Callable[[], None] = lambda: None,
    ) -> Answer:
        """The stage's layers over the rows of step `number`, which has begun.

        Args:
            order: the aliases in the order of their rows.
            activations: [tokens, width] each.
            arrived: called when the answer is there, and still has to be decoded.

        Raises:
            StageLost: whatever prevents an answer.
        """
        payload = self.form.encode(activations)
        self.channel.send(Kind.ACTS, Acts(order), payload, number, self.patience)
        try:
            reply = self._receive(Kind.REPLY, number, self.patience)
            arrived()
            hidden = activations.hidden
            times = wire.decode(StepSeconds, reply.metadata)
            rows = self.form.decode(reply.payload, hidden.shape[0], hidden.device)
            return Answer(rows, times.total)
        except StageRefused as error:
            raise StageLost(str(error), "memory" if error.code == "memory" else "gone") from error
        except WireError as error:
            raise StageLost(str(error)) from error

    def read_kv(self, wanted: KvBlocks, size_bytes: int) -> bytearray:
        """Pages of KV blocks, [layer, block, byte]; of at most MAX_KV_BYTES. Raises StageLost."""
        return self._about_kv(Kind.READ_KV, wanted, (), Kind.KV, size_bytes).payload

    def write_kv(self, given: KvBlocks, pages: memoryview) -> None:
        """The inverse of read_kv. Raises StageLost."""
        self._about_kv(Kind.WRITE_KV, given, [pages], Kind.OK, 0)

    def close(self) -> None:
        self.channel.close()

    def _about_kv(
        self,
        kind: Kind,
        about: KvBlocks,
        payload: Sequence[memoryview],
        answer: Kind,
        size_bytes: int,
    ) -> Message:
        self.channel.send(kind, about, payload, patience=self.patience)
        try:
            message = self._receive(answer, 0, self.patience)
        except StageRefused as error:
            raise StageLost(str(error), "memory" if error.code == "memory" else "gone") from error
        except WireError as error:
            raise StageLost(str(error)) from error
        if len(message.payload) != size_bytes:
            raise StageLost(f"{len(message.payload)} bytes of KV pages, not {size_bytes}")
        return message

    def _receive(self, kind: Kind, step: int, patience: Patience) -> Message:
        return _receive(self.stage, self.channel, kind, step, patience)


# A stage that was alive and too slow gets so much more time for a step, once.
_MORE_TIME = 1.5
_PINGS = 3


class Stages:
    """The stages of the configuration, which is next, and how long each may take."""

    def __init__(
        self,
        config: SplitConfig,
        hello: Hello,
        dtype: torch.dtype | None,
        packing: str | None = None,
    ) -> None:
        """
        Args:
            dtype: None: the stage's, which it tells clients.
            packing: how KV pages must be arranged, where ours are stored with them; None: any way.

        Raises SecurityError: a certificate or the token cannot be used."""
        self._config = config
        self._hello = hello
        self._dtype = dtype
        self._packing = packing
        self._next = 0
        self._step_s: dict[str, float] = {}
        self._tls = _tls(config)

    def connect(self, *, patient: bool = True) -> Link:
        """A lease at the first stage that gives one; if `patient`, waits for those that still load.

        Raises:
            StageRefused: all refuse, and this is what the first of them said.
            SplitError: none answers; names each with its reason.
        """
        until = time.monotonic() + self._config.load_ms / 1000
        while True:
            failures: list[SplitError] = []
            for stage in self.in_order():
                try:
                    return self.dial(stage, self._config.span, until if patient else None)
                except SplitError as error:
                    failures.append(error)
                    logger.warning("%s", error)
            is_over = not patient or time.monotonic() > until
            if is_over or not any(map(_passes, failures)):
                raise _summary(failures)
            time.sleep(0.5)

    def in_order(self) -> Iterator[str]:
        """Each stage once, beginning after the last one that this has named."""
        stages = self._config.stages
        first = self._next
        for offset in range(len(stages)):
            index = (first + offset) % len(stages)
            self._next = (index + 1) % len(stages)
            yield stages[index]

    def give_time(self, stage: str) -> None:
        """Let its steps take longer from the next lease on."""
        self._step_s[stage] = self._patience_s(stage) * _MORE_TIME

    def dial(self, stage: str, span: Span, load_until: float | None = None) -> Link:
        """A lease on these layers of one stage.

        Args:
            load_until: wait so long (time.monotonic) while it loads; None: it counts as lost then.

        Raises:
            SplitError: none; names the stage.
        """
        try:
            return self._dial(stage, span, load_until)
        except (SplitError, OSError) as error:
            raise _named(stage, error) from error

    def dial_again(self, stage: str, span: Span) -> Link:
        """The same at a stage where our lease has just ended: while it gives that back, and
        finishes the step that was too slow, it is busy."""
        wait_s = max(self._patience_s(stage), self._config.connect_ms / 1000)
        until = time.monotonic() + wait_s
        while True:
            try:
                return self.dial(stage, span)
            except StageRefused as error:
                if error.code != "busy" or time.monotonic() > until:
                    raise
            time.sleep(0.05)

    def ping(self, stage: str) -> float:
        """Seconds of a round trip, the best of some, without a lease. Raises SplitError."""
        address, wait_s = Address.parse(stage), self._config.connect_ms / 1000
        channel = Channel(connect(address.host, address.port, wait_s, self._tls))
        try:
            return min(channel.ping(Patience(silence_s=wait_s)) for _ in range(_PINGS))
        finally:
            channel.close()

    def _patience_s(self, stage: str) -> float:
        return self._step_s.get(stage, self._config.step_ms / 1000)

    def _dial(self, stage: str, span: Span, load_until: float | None) -> Link:
        config = self._config
        address = Address.parse(stage)
        wait_s = config.connect_ms / 1000
        channel = Channel(connect(address.host, address.port, wait_s, self._tls))
        patience = Patience(config.lost_ms / 1000, config.heartbeat_ms / 1000)
        try:
            channel.send(Kind.HELLO, self._hello_for(span), patience=patience)
            if load_until is not None:
                load_s = max(load_until - time.monotonic(), wait_s)
                first = replace(patience, silence_s=_LOAD_SILENCE_S, total_s=load_s)
            else:
                first = replace(patience, total_s=wait_s)
            channel.max_metadata = wire.MAX_METADATA_BYTES
            message = _receive(stage, channel, Kind.WELCOME, 0, first)
            welcome = wire.decode(Welcome, message.metadata)
            if not 1 <= welcome.width <= wire.MAX_WIDTH:
                raise WireError(f"activations of {welcome.width} elements a token")
            if self._packing not in (None, welcome.packing):
                said = f"KV pages are for {welcome.packing[:60] or 'it does not say what'}"
                with_ours = f"ours for {self._packing}, and the connector stores both together"
                raise StageRefused(stage, "model", f"{said}, {with_ours}")
            dtype = self._dtype or _dtype_of(welcome)
            form = Form(self._hello.form, welcome.width, dtype, "residual" in welcome.tensors)
        except BaseException:
            channel.close()
            raise
        channel.max_payload = form.payload_bytes(self._hello.max_tokens)
        channel.max_kv_payload = wire.MAX_KV_BYTES
        channel.shares_cores = welcome.shares_cores
        patience = replace(patience, total_s=self._patience_s(stage))
        return Link(stage, welcome, form, channel, patience)

    def _hello_for(self, span: Span) -> Hello:
        """The token is read for each connection: whoever renews it replaces the file. The cores
        have another name each time: a stage cannot tell by it who connects again."""
        token_file = self._config.token_file
        token = self._hello.token if token_file is None else read_token(token_file)
        layers = "" if self._hello.measuring else spans.text(span)
        named = {"token": token, "layers": layers, "cores": name_cores()}
        return msgspec.structs.replace(self._hello, **named)


def _receive(stage: str, channel: Channel, kind: Kind, step: int, patience: Patience) -> Message:
    message = channel.receive(patience)
    if message.kind == Kind.BYE:
        raise StageLost("the stage is shutting down")
    if message.kind == Kind.ERROR:
        error = wire.decode(wire.Error, message.metadata)
        raise StageRefused(stage, error.code, error.message)
    return expect(message, kind, step)


def _dtype_of(welcome: Welcome) -> torch.dtype:
    name = "" if welcome.about is None else welcome.about.dtype
    if name not in _DTYPES:
        raise WireError(f"a stage that computes in {name[:20]!r}")
    return _DTYPES[name]


def _unasked(message: Message) -> str:
    """What a message between steps says: only Bye and Error can be."""
    if message.kind == Kind.ERROR:
        return wire.decode(wire.Error, message.metadata).message
    return "the stage is shutting down" if message.kind == Kind.BYE else f"{message.kind.name}?"


def _tls(config: SplitConfig) -> ssl.SSLContext | None:
    if config.tls.ca is None:
        return None
    return client_context(config.tls.ca, config.tls.certificate, config.tls.key)


def _named(stage: str, error: Exception) -> SplitError:
    return error if isinstance(error, StageRefused) else StageLost(f"stage {stage}: {error}")


def _passes(error: SplitError) -> bool:
    """Whether waiting may help."""
    return not isinstance(error, StageRefused) or error.code == "busy"


def _summary(failures: Sequence[SplitError]) -> SplitError:
    refused = [each for each in failures if isinstance(each, StageRefused)]
    if len(refused) == len(failures):
        return refused[0]
    return SplitError("no stage can be used: " + "; ".join(str(each) for each in failures))
