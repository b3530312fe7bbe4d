"""What a client's scheduler decides: which rows of which sessions go into the next step.

A session's inputs stay here. That makes three things the same: rows that are new, rows that a lost
stage had, and rows whose blocks were given to another session. All are computed from the first one
that the stage does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from mcp_vllm.split.errors import StageResourceError
from mcp_vllm.split.kv_blocks import BlockPool
from mcp_vllm.split.wire import Continued, NewRequest, Step

# A stage keeps state of so many requests for each that a step may have.
RESIDENT_PER_REQUEST = 4


@dataclass
class Session:
    """Attributes:
    inputs: rows [tokens, width] that were given, in their order.
    num_inputs: rows in all.
    num_computed: rows that the stage has in its KV blocks.
    table: block ids, by group.
    alias: at the stage; None: it does not know the session.
    """

    inputs: list[torch.Tensor] = field(default_factory=list)
    num_inputs: int = 0
    num_computed: int = 0
    table: list[list[int]] = field(default_factory=list)
    alias: int | None = None

    def append(self, rows: torch.Tensor) -> None:
        self.inputs.append(rows)
        self.num_inputs += rows.shape[0]

    def truncate(self, num_inputs: int) -> None:
        """Forget all rows but the first `num_inputs`."""
        while self.inputs and self.num_inputs - self.inputs[-1].shape[0] >= num_inputs:
            self.num_inputs -= self.inputs.pop().shape[0]
        if self.num_inputs > num_inputs:
            self.inputs[-1] = self.inputs[-1][: num_inputs - self.num_inputs]
            self.num_inputs = num_inputs
        self.num_computed = min(self.num_computed, num_inputs)

    def rows(self, count: int) -> torch.Tensor:
        """The next `count` rows to compute."""
        if len(self.inputs) > 1 and self.num_computed + self.inputs[-1].shape[0] < self.num_inputs:
            self.inputs = [torch.cat(self.inputs)]
        first = self.num_inputs - self.inputs[-1].shape[0]
        start = self.num_computed - first
        return self.inputs[-1][start : start + count]


@dataclass(frozen=True)
class Batch:
    """A step, and whose rows it has: sessions and counts, in the order of the rows."""

    step: Step
    order: list[int]
    rows: torch.Tensor
    parts: list[tuple[Session, int]]


class BatchPlanner:
    """One lease's aliases and blocks.

    Args:
        pool: the lease's blocks.
        max_tokens, max_requests: of a step.
        max_session_tokens: that a session may have.
    """

    def __init__(
        self, pool: BlockPool, max_tokens: int, max_requests: int, max_session_tokens: int
    ) -> None:
        self.max_session_tokens = max_session_tokens
        self._pool = pool
        self._max_tokens = max_tokens
        self._max_requests = max_requests
        self._last_alias = 0
        self._num_resident = 0
        self._finished: list[int] = []

    def next_batch(self, wanted: Iterable[Session], idle: Sequence[Session]) -> Batch | None:
        """A step for those of `wanted` that have rows to compute; None: none has.

        Args:
            idle: other sessions, the longest unused first: their blocks go when there are too few.

        Raises:
            StageResourceError: not even one session's rows fit into all blocks.
        """
        waiting = [each for each in wanted if each.num_computed < each.num_inputs]
        if not waiting:
            return None
        new: list[NewRequest] = []
        continued: list[Continued] = []
        scheduled: list[tuple[int, int]] = []
        parts: list[tuple[Session, int]] = []
        room = self._max_tokens
        losers = [each for each in idle if each.alias is not None]
        for session in waiting[: self._max_requests]:
            count = min(room, session.num_inputs - session.num_computed)
            if count == 0:
                break
            total = session.num_computed + count
            if not self._make_room(session, total, losers):
                break
            added = self._pool.extend(session.table, total)
            if session.alias is None:
                while losers and self._num_resident >= RESIDENT_PER_REQUEST * self._max_requests:
                    self.forget(losers.pop(0))
                self._last_alias += 1
                self._num_resident += 1
                session.alias = self._last_alias
                # All of a session counts as prompt: nothing is sampled from it at the stage.
                length, table = self.max_session_tokens, [list(ids) for ids in session.table]
                new.append(NewRequest(session.alias, length, session.num_computed, table))
            else:
                blocks = added if any(added) else None
                continued.append(Continued(session.alias, session.num_computed, blocks))
            scheduled.append((session.alias, count))
            parts.append((session, count))
            room -= count
        if not parts:
            raise StageResourceError(
                f"a session of {waiting[0].num_inputs} tokens needs more KV blocks than the "
                f"{self._pool.num_free} that are free of {self._pool.num_blocks}: close sessions, "
                "or start the stage with a larger --kv-bytes"
            )
        finished, self._finished = self._finished, []
        rows = torch.cat([session.rows(count) for session, count in parts])
        step = Step(finished, new, continued, scheduled, [], [])
        return Batch(step, [alias for alias, _ in scheduled], rows, parts)

    def forget(self, session: Session, keep_blocks: bool = False) -> None:
        """Let the stage drop its state of the session, which stays valid here."""
        if session.alias is not None:
            self._finished.append(session.alias)
            self._num_resident -= 1
            session.alias = None
        if not keep_blocks:
            self._pool.release(session.table)
            session.num_computed = 0

    def _make_room(self, session: Session, num_tokens: int, losers: list[Session]) -> bool:
        if not session.table:
            session.table = self._pool.empty_table()
        while losers and self._pool.missing(session.table, num_tokens) > self._pool.num_free:
            self.forget(losers.pop(0))
        return self._pool.missing(session.table, num_tokens) <= self._pool.num_free
