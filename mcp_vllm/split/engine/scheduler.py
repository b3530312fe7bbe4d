"""vLLM's scheduler, which takes back a step whose stage was lost: all that runs is recomputed.

Chosen by class path (`scheduler_cls`); lives in the engine core's thread.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus


@dataclass
class StageLostOutput(ModelRunnerOutput):
    """What the executor returns for a step that nobody has answered.

    Attributes:
        failure: why nobody can answer the next one either; None: somebody will.
    """

    failure: str | None = None


@dataclass
class MovingOutput(ModelRunnerOutput):
    """What the executor returns for the last step before layers move: its tokens count."""

    @classmethod
    def of(cls, output: ModelRunnerOutput) -> MovingOutput:
        return cls(**{each.name: getattr(output, each.name) for each in fields(ModelRunnerOutput)})


class SplitScheduler(Scheduler):
    """The stage's KV blocks are gone with it, those of finished requests' prefixes included: so
    requests are preempted and the prefix cache is emptied. No token is lost, and none of this
    step's is taken."""

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        if isinstance(model_runner_output, StageLostOutput):
            self._start_over()
            if model_runner_output.failure is not None:
                # vLLM's list of requests that `update_from_output` ends with an error.
                self.grammar_compile_error_reqs.update(self.requests)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if isinstance(model_runner_output, MovingOutput):
            self._start_over()
        return outputs

    def _start_over(self) -> None:
        """No KV block holds anything any more, nor do host chunks that were being filled. Whoever
        waits for chunks to be loaded, or has some and does not run yet, begins anew, too; what the
        agent has is loaded again."""
        for request in reversed(list(self.kv_holding_waiting)):
            self.kv_holding_waiting.remove_request(request)
            self.deferred_waiting.discard(request)
            self._inflight_prefills.discard(request)
            self._set_kv_fetch_stage(request, None)
            self._free_request_blocks(request)
            self.finished_recving_kv_req_ids.discard(request.request_id)
            self.failed_recving_kv_req_ids.discard(request.request_id)
            request.num_computed_tokens = 0
            if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                again = request.num_preemptions > 0
                request.status = RequestStatus.PREEMPTED if again else RequestStatus.WAITING
            elif request.status == RequestStatus.WAITING_FOR_STREAMING_REQ:
                # Its prompt so far is in its blocks only. vLLM's list of requests that end with an
                # error.
                self.deferred_waiting.add(request)
                self.grammar_compile_error_reqs.add(request.request_id)
            self.waiting.prepend_request(request)
        for request in [each for each in self.requests.values() if each.is_finished()]:
            self._free_blocks(request)  # aborted while chunks were on their way
        self.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        if self.connector is not None:
            self.connector.forget_blocks()
