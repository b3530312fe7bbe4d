"""Loads and stores that are under way on the link, and how long each may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mcp_vllm.link import protocol
from mcp_vllm.link.events import JobDone
from mcp_vllm.link.protocol import Key, LinkError


@dataclass
class Job:
    """A load (into `chunk_ids`, of which `missing` have not landed) or a store (from them)."""

    is_load: bool
    keys: Sequence[Key]
    chunk_ids: Sequence[int]
    deadline_s: float
    missing: set[int] = field(default_factory=set)


class JobTable:
    """The link's jobs by id. What fails is told to `emit`."""

    def __init__(self, emit: Callable[[JobDone], None]) -> None:
        self._emit = emit
        self._jobs: dict[int, Job] = {}

    def add_load(self, load: protocol.Load, chunk_ids: Sequence[int], within_s: float) -> None:
        missing = set(range(len(load.keys)))
        deadline_s = time.monotonic() + within_s
        self._jobs[load.job_id] = Job(True, load.keys, chunk_ids, deadline_s, missing)

    def add_store(self, store: protocol.Store, within_s: float) -> None:
        deadline_s = time.monotonic() + within_s
        self._jobs[store.job_id] = Job(False, store.keys, store.chunk_ids, deadline_s)

    def get(self, job_id: int) -> Job | None:
        return self._jobs.get(job_id)

    def end(self, job_id: int, *, is_load: bool) -> Job | None:
        """The job, which is forgotten; None when it was given up before.

        Raises:
            LinkError: it is a job of the other kind.
        """
        job = self._jobs.get(job_id)
        if job is not None and job.is_load != is_load:
            raise LinkError(f"the agent mistakes job {job_id} for another kind")
        return self._jobs.pop(job_id, None)

    def fail_all(self, cause: str) -> None:
        for job_id in list(self._jobs):
            self._fail(job_id, cause)

    def expire(self) -> None:
        """Fail the jobs whose deadline has passed."""
        now_s = time.monotonic()
        for job_id in list(self._expired_at(now_s)):
            self._fail(job_id, "agent timeout")

    def next_deadline_s(self) -> float:
        """Seconds until the next job expires, at most 1."""
        if not self._jobs:
            return 1.0
        first_s = min(job.deadline_s for job in self._jobs.values())
        return min(1.0, max(0.0, first_s - time.monotonic()))

    def _expired_at(self, now_s: float) -> Iterator[int]:
        return (job_id for job_id, job in self._jobs.items() if job.deadline_s <= now_s)

    def _fail(self, job_id: int, cause: str) -> None:
        job = self._jobs.pop(job_id)
        failed = job.missing if job.is_load else range(len(job.keys))
        self._emit(JobDone(job_id, frozenset(failed), causes=(cause,)))
