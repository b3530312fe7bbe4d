"""What a stage and the way to it take: ordinary steps of a lease that says it is measuring.

The steps carry made-up rows of requests that do not exist, at any context: the stage believes what
it is told is computed. It answers with its own times; what is left of the round trip is the link.
No vLLM here: the stage has it.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from mcp_vllm.config.split import SplitConfig, parse_layers
from mcp_vllm.split import wire
from mcp_vllm.split.activations import Activations
from mcp_vllm.split.channel import expect
from mcp_vllm.split.errors import SplitError
from mcp_vllm.split.link import Link, Stages
from mcp_vllm.split.plan.cost import Load
from mcp_vllm.split.plan.figures import (
    WAIT_S,
    Figures,
    LinkFigures,
    Transfer,
    typical,
    typical_times,
)
from mcp_vllm.split.plan.shape import ModelShape, Work
from mcp_vllm.split.wire import (
    Acts,
    Continued,
    Hello,
    Kind,
    KvGroup,
    KvInit,
    NewRequest,
    Step,
    StepSeconds,
)

# Steps of one work in a row, of which the first does not count, and how often all works come round:
# a virtual machine may be twice as slow for tenths of a second, longer than a row takes.
_ROW, _ROUNDS = 3, 4
_READ_BYTES = 1 << 20
_CORES = os.cpu_count() or 1


def probe_stage(config: SplitConfig, shape: ModelShape, load: Load) -> tuple[Figures, LinkFigures]:
    """Measure the first of `config.stages`, and the link to it with activations in `config.form`.

    Raises:
        SplitError: no stage answers, or it holds another model.
        SecurityError: a certificate or the token cannot be used.
    """
    dtype: torch.dtype = getattr(torch, shape.dtype)
    hello = Hello(
        facts={},
        max_model_len=load.context + 2 * _ROW,
        max_requests=max(2, load.batch),
        max_tokens=max(load.budget, load.batch, 2),
        form=config.form,
        measuring=True,
    )
    link = Stages(config, hello, dtype).connect()
    try:
        with ThreadPoolExecutor(_CORES) as threads:
            wait = partial(_compute, threads) if link.welcome.shares_cores else _idle
            return _Probe(link, shape, config.load_ms / 1000, wait).measure(load)
    finally:
        link.close()


def _idle() -> None:
    time.sleep(WAIT_S)


def _compute(threads: ThreadPoolExecutor) -> None:
    """Keep all cores busy, as the engine's layers would: a stage whose cores were idle meanwhile
    has to wake them, and takes longer on some machines."""
    until = time.perf_counter() + WAIT_S

    def read(data: bytes) -> None:
        while time.perf_counter() < until:
            zlib.crc32(data)  # without the interpreter's lock

    list(threads.map(read, [bytes(_READ_BYTES)] * _CORES))


class _Probe:
    """One measuring lease."""

    def __init__(
        self, link: Link, shape: ModelShape, load_s: float, wait: Callable[[], None]
    ) -> None:
        """`wait`: for WAIT_S."""
        if link.welcome.about is None:
            raise SplitError(f"stage {link.stage} does not measure: upgrade it")
        self._link = link
        self._shape = shape
        self._load_s = load_s
        self._wait = wait
        self._about = link.welcome.about
        self._first, self._end = parse_layers(self._about.layers)
        if link.welcome.width != shape.hidden or self._end >= shape.num_layers:
            raise SplitError(
                f"stage {link.stage} holds layers {self._about.layers} of width "
                f"{link.welcome.width}: not of {shape.name}, which has {shape.num_layers} of "
                f"{shape.hidden}"
            )
        if self._about.dtype != shape.dtype:
            raise SplitError(
                f"stage {link.stage} computes in {self._about.dtype}, the plan is for "
                f"{shape.dtype}: start it with --dtype {shape.dtype}, or plan for its dtype"
            )
        self._groups = _groups(link.welcome)
        self._number = self._alias = 0
        self._finished: list[int] = []
        self._layers: defaultdict[Work, list[list[float]]] = defaultdict(list)
        self._rest: defaultdict[Work, list[float]] = defaultdict(list)
        self._ways: defaultdict[int, list[float]] = defaultdict(list)

    def measure(self, load: Load) -> tuple[Figures, LinkFigures]:
        works = list(_works(load))
        needed = max(sum(map(len, self._blocks(each, _ROW))) for each in works)
        kv_init = KvInit(1 + needed, None, self._groups)
        self._link.init_kv(kv_init, self._load_s)
        for work in works * _ROUNDS:
            if work.is_decode:
                self._decode(work)
            else:
                self._prefill(work)
        return self._figures(), self._transfers()

    def _prefill(self, work: Work) -> None:
        for i in range(_ROW):
            self._start(work, work.context)
            self._step(work, keep=i > 0)

    def _decode(self, work: Work) -> None:
        """A batch that goes on, one token each, from a context that was never computed."""
        aliases = self._start(work, work.context + _ROW)
        self._step(work, keep=False)
        for i in range(1, _ROW):
            self._send = Step(
                finished=[],
                new=[],
                continued=[Continued(each, work.context + i - 1, None) for each in aliases],
                scheduled=[(each, 1) for each in aliases],
                zeroed=[],
                copies=[],
            )
            self._step(work, keep=True)

    def _start(self, work: Work, length: int) -> list[int]:
        """Prepare a step of new requests; those of the step before end."""
        aliases = list(range(self._alias + 1, self._alias + 1 + work.requests))
        self._alias = aliases[-1]
        blocks = self._blocks(work, length - work.context)
        per = [len(ids) // work.requests for ids in blocks]
        self._send = Step(
            finished=self._finished,
            new=[
                NewRequest(
                    alias,
                    length,
                    work.context - work.tokens,
                    [ids[i * n : (i + 1) * n] for ids, n in zip(blocks, per, strict=True)],
                )
                for i, alias in enumerate(aliases)
            ],
            continued=[],
            scheduled=[(alias, work.tokens) for alias in aliases],
            zeroed=[],
            copies=[],
        )
        self._finished = aliases
        return aliases

    def _step(self, work: Work, keep: bool) -> None:
        link = self._link
        self._number += 1
        rows = torch.randn(work.num_tokens, self._shape.hidden).to(
            getattr(torch, self._shape.dtype)
        )
        residual = rows.clone() if link.form.has_residual else None
        started = time.perf_counter()
        link.begin(self._number, self._send)
        beginning = time.perf_counter() - started
        self._wait()  # the stage prepares, and waits as for the engine's layers
        started = time.perf_counter()
        link.announce()
        payload = link.form.encode(Activations(rows, residual))
        order = Acts([alias for alias, _ in self._send.scheduled])
        link.channel.send(Kind.ACTS, order, payload, self._number, link.patience)
        message = link.channel.receive(link.patience)
        if message.kind == Kind.ERROR:
            said = wire.decode(wire.Error, message.metadata).message
            raise SplitError(f"stage {link.stage} gave up while it was measured: {said}")
        expect(message, Kind.REPLY, self._number)
        link.form.decode(message.payload, work.num_tokens, rows.device)
        seconds = time.perf_counter() - started
        times = wire.decode(StepSeconds, message.metadata)
        if len(times.layers) != self._end - self._first or not 0 < times.total <= seconds:
            raise SplitError(f"stage {link.stage} says times that cannot be")
        if keep:
            self._layers[work].append(times.layers)
            self._rest[work].append(max(times.total - sum(times.layers), 1e-6))
            self._ways[2 * len(message.payload)].append(beginning + seconds - times.total)

    def _blocks(self, work: Work, more: int) -> list[list[int]]:
        """Block ids of all requests, by group; id 0 is the null block."""
        ids, first = [], 1
        for group in self._groups:
            size = group.spec[1].get("block_size")
            if type(size) is not int or size < 1:
                raise SplitError(f"stage {self._link.stage} has blocks of {size!r} tokens")
            count = work.requests * -(-(work.context + more) // size)
            ids.append(list(range(first, first + count)))
            first += count
        return ids

    def _figures(self) -> Figures:
        layers, rest = [], []
        for work, repeats in self._layers.items():
            times, beside = typical_times(work, repeats, self._rest[work], self._first)
            layers += times
            rest.append(beside)
        about = self._about
        return Figures.model_validate(
            {
                "kind": "stage",
                "machine": about.machine[:200],
                "model": self._shape.name[:200],
                "hidden": self._shape.hidden,
                "dtype": about.dtype,
                "dtypes": about.dtypes,
                "memory_bytes": about.memory_bytes,
                "layers": layers,
                "rest": rest,
            }
        )

    def _transfers(self) -> LinkFigures:
        return LinkFigures(
            transfers=[
                Transfer(bytes=size, seconds=typical(seconds))
                for size, seconds in sorted(self._ways.items())
            ]
        )


def _works(load: Load) -> Iterator[Work]:
    """The steps to time: from short ones to the longest, as the local side measures them."""
    longest = load.context
    contexts = sorted({min(each, longest) for each in (32, longest // 2, longest)})
    for batch in sorted({1, 2, max(1, load.batch // 2), load.batch}):
        for context in contexts:
            yield Work(batch, 1, context)
    for tokens in sorted({min(each, longest, load.budget) for each in (16, 64, 160, 384, 1 << 30)}):
        for context in sorted({tokens, max(tokens, longest // 2), longest}):
            yield Work(1, tokens, context)


def _groups(welcome: wire.Welcome) -> list[KvGroup]:
    """Layers of equal KV specs together."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name, spec in welcome.kv_specs.items():
        names[repr(spec)].append(name)
    return [KvGroup(each, welcome.kv_specs[each[0]]) for each in names.values()]
