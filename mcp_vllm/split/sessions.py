"""Sessions of one client at the stages that hold one range of layers.

To a stage the client is an engine: it allocates KV blocks, keeps block tables and positions, and
sends steps. What it sent of each session it also keeps, so that a lost stage costs no session: the
next one computes the kept rows again, as in Petals (arXiv:2209.01188).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from mcp_vllm.split import wire
from mcp_vllm.split.activations import Activations
from mcp_vllm.split.batch import Batch, BatchPlanner, Session
from mcp_vllm.split.errors import (
    SplitError,
    StageLost,
    StageRefused,
    StageResourceError,
    StageTimeout,
    WireError,
)
from mcp_vllm.split.kv_blocks import BlockPool
from mcp_vllm.split.link import Link, Stages
from mcp_vllm.split.noise import NoisySessions
from mcp_vllm.split.wire import Hello, KvInit, KvPlan

logger = logging.getLogger(__name__)

_RETRY_S = 0.2


@dataclass(frozen=True)
class Endurance:
    """How a client bears trouble.

    Attributes:
        attempts: of one call, each at another lease.
        step_s: patience with a step; times TIMEOUT_GROWTH after each that takes longer.
        load_s: how long to wait for a stage that still loads, and for its KV blocks.
        reconnect_s: how long to look for a stage after one is lost.
    """

    attempts: int
    step_s: float
    load_s: float
    reconnect_s: float


TIMEOUT_GROWTH = 1.5


class StageSessions:
    """The sessions of one range of layers; one lease. Safe for several threads, which take turns.

    Attributes:
        step_s: patience with a step at present.
    """

    def __init__(
        self, stages: Stages, hello: Hello, endurance: Endurance, noise: NoisySessions | None = None
    ) -> None:
        self.step_s = endurance.step_s
        self._stages = stages
        self._hello = hello
        self._endurance = endurance
        self._noise = noise
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}  # the longest unused first
        self._abandoned: deque[str] = deque()
        self._link: Link | None = None
        self._planner: BatchPlanner | None = None
        self._number = 0
        self._was_connected = False

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Continue each session by these rows, all in the same steps.

        Args:
            inputs: rows [tokens, width] by session; a name that is not known begins one.

        Returns: the rows after the stage's layers, in the stage's dtype.

        Raises:
            StageResourceError: too many tokens for a session, or for all; or no lease is free.
            StageTimeout, StageLost: no stage has answered, with all attempts.
            StageRefused: the stages hold other layers, or other weights, or do not know us.
            SplitError: no stage can be used.

        After an error the sessions are as before the call.
        """
        with self._lock:
            self._end_abandoned()
            self._connected()
            starts = self._append(inputs)
            try:
                return self._persist(starts)
            except BaseException:
                for name, start in starts.items():
                    self._shorten(name, start)
                raise

    def length(self, name: str) -> int:
        """Tokens of a session; 0: there is none."""
        session = self._sessions.get(name)
        return 0 if session is None else session.num_inputs

    def fork(self, name: str, copy: str) -> None:
        """Begin session `copy` with what `name` has so far; the stage computes it once more."""
        with self._lock:
            session = self._sessions.get(name)
            if session is None:
                return
            self._sessions[copy] = Session(list(session.inputs), session.num_inputs)
            if self._noise is not None:
                self._noise.fork(name, copy)

    def epsilon(self, name: str) -> float:
        """What the session has spent of its privacy. Raises SplitError: there is no noise."""
        if self._noise is None:
            raise SplitError("no noise is set: nothing bounds what activations tell")
        return self._noise.epsilon(name)

    def truncate(self, name: str, num_tokens: int) -> None:
        """Forget the session's tokens but the first ones."""
        with self._lock:
            self._shorten(name, num_tokens)

    def end(self, name: str) -> None:
        """Free what a session holds, here and at the stage; of one that is not known: nothing."""
        with self._lock:
            self._shorten(name, 0)

    def abandon(self, name: str) -> None:
        """`end` before the next call, the account of its privacy included; may be called at any
        time, as while garbage is collected."""
        self._abandoned.append(name)

    def close(self) -> None:
        """End the lease and all sessions. Idempotent."""
        with self._lock:
            self._drop_link()
            self._sessions.clear()

    def _append(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Take the rows in; how many each session had before."""
        assert self._link is not None
        assert self._planner is not None
        form, most = self._link.form, self._planner.max_session_tokens
        for name, rows in inputs.items():
            if rows.dim() != 2 or rows.shape[0] < 1 or rows.shape[1] != form.width:
                raise ValueError(
                    f"input_data of shape {tuple(rows.shape)}, not (tokens, {form.width})"
                )
            total = self.length(name) + rows.shape[0]
            if total > most:
                raise StageResourceError(
                    f"session {name!r} would have {total} tokens, stage {self._link.stage} allows "
                    f"{most} (its --max-model-len)"
                )
        sent = {name: rows.detach().to("cpu") for name, rows in inputs.items()}
        if self._noise is not None:
            sent = self._noise.add(sent)
        starts = {}
        for name, rows in sent.items():
            session = self._sessions.pop(name, None) or Session()
            self._sessions[name] = session
            starts[name] = session.num_inputs
            session.append(rows.to(form.dtype, copy=True))
        return starts

    def _persist(self, starts: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """`_compute`, with another lease after each failure."""
        attempt = 0
        while True:
            attempt += 1
            try:
                self._connected()
                return self._compute(starts)
            except StageLost as error:
                self._lose(error)
                if attempt >= self._endurance.attempts:
                    raise

    def _compute(self, starts: Mapping[str, int]) -> dict[str, torch.Tensor]:
        assert self._planner is not None
        wanted = [self._sessions[name] for name in starts]
        idle = [each for name, each in self._sessions.items() if name not in starts]
        outputs: dict[int, list[torch.Tensor]] = {id(each): [] for each in wanted}
        while (batch := self._planner.next_batch(wanted, idle)) is not None:
            rows = self._step(batch)
            first = 0
            for session, count in batch.parts:
                outputs[id(session)].append(rows[first : first + count])
                session.num_computed += count
                first += count
        results = {}
        for (name, start), session in zip(starts.items(), wanted, strict=True):
            # After a replay there are rows of earlier calls, too.
            results[name] = torch.cat(outputs[id(session)])[-(session.num_inputs - start) :]
        return results

    def _step(self, batch: Batch) -> torch.Tensor:
        assert self._link is not None
        link = replace(self._link, patience=replace(self._link.patience, total_s=self.step_s))
        self._number += 1
        link.begin(self._number, batch.step)
        try:
            result = link.run(self._number, batch.order, Activations(batch.rows, None))
        except StageLost as error:
            refusal = error.__cause__
            if isinstance(refusal, StageRefused) and refusal.code == "memory":
                self._lose(error)
                raise StageResourceError(str(refusal)) from error
            raise
        return result.activations.hidden

    def _connected(self) -> None:
        """Have a lease. Raises SplitError."""
        if self._link is not None:
            return
        link = self._dial()
        try:
            planned = wire.decode(KvPlan, link.init_kv(KvInit(0, None, []), self._endurance.load_s))
            pool = BlockPool(planned)
            hello = self._hello
            self._planner = BatchPlanner(
                pool, hello.max_tokens, hello.max_requests, planned.max_model_len
            )
        except WireError as error:
            link.close()
            raise SplitError(f"stage {link.stage} is not for clients: {error}") from error
        except BaseException:
            link.close()
            raise
        self._link, self._number, self._was_connected = link, 0, True
        logger.info("stage %s runs our layers", link.stage)

    def _dial(self) -> Link:
        patience_s = self._endurance.reconnect_s if self._was_connected else 0.0
        until = time.monotonic() + patience_s
        while True:
            try:
                return self._stages.connect(patient=not self._was_connected)
            except StageRefused as error:
                passes = error.code in ("busy", "memory")
                if passes and time.monotonic() > until:
                    raise StageResourceError(str(error)) from error
                if not passes:
                    raise
            except SplitError:
                if time.monotonic() > until:
                    raise
            time.sleep(_RETRY_S)

    def _lose(self, error: StageLost) -> None:
        """Let go of the lease; what sessions had at the stage is to be computed again."""
        if isinstance(error, StageTimeout):
            self.step_s *= TIMEOUT_GROWTH
        if self._link is not None:
            logger.warning("stage %s is lost: %s", self._link.stage, error)
        self._drop_link()

    def _drop_link(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link = self._planner = None
        for session in self._sessions.values():
            session.alias, session.table, session.num_computed = None, [], 0

    def _shorten(self, name: str, num_inputs: int) -> None:
        session = self._sessions.get(name)
        if session is None or num_inputs >= session.num_inputs:
            return
        session.truncate(num_inputs)
        if self._planner is not None:
            self._planner.forget(session, keep_blocks=num_inputs > 0)
        if num_inputs == 0:
            del self._sessions[name]

    def _end_abandoned(self) -> None:
        while self._abandoned:
            name = self._abandoned.popleft()
            self._shorten(name, 0)
            if self._noise is not None:
                self._noise.forget(name)
