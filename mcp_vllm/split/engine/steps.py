"""Scheduler outputs of vLLM as steps of the wire, and back.

The engine's side is a list of what may leave: a field that is not written here stays. The stage's
side trusts nothing: aliases, block ids, counts and lengths are checked against the lease before
vLLM's model runner sees them.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from mcp_vllm.split.errors import StageRefused
from mcp_vllm.split.wire import Continued, NewRequest, Step


class StepEncoder:
    """One lease's aliases; a new lease starts with a new encoder."""

    def __init__(self) -> None:
        self._aliases: dict[str, int] = {}
        self._last_alias = 0

    def encode(self, output: SchedulerOutput) -> Step:
        """The step for the stage. Requests that are resumed get a new alias, so that a stage that
        has never seen them is no special case."""
        counts = output.num_scheduled_tokens
        finished = [
            self._aliases.pop(req_id)
            for req_id in output.finished_req_ids
            if req_id in self._aliases
        ]
        new: list[NewRequest] = []
        for each in output.scheduled_new_reqs:
            alias = self._renamed(each.req_id, finished)
            blocks = _blocks(each.block_ids)
            new.append(NewRequest(alias, each.prompt_len, each.num_computed_tokens, blocks))
        continued: list[Continued] = []
        cached = output.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            computed, added = cached.num_computed_tokens[i], cached.new_block_ids[i]
            if req_id in cached.resumed_req_ids:
                assert added is not None
                alias = self._renamed(req_id, finished)
                prompt_len = len(cached.all_token_ids[req_id]) - cached.num_output_tokens[i]
                new.append(NewRequest(alias, prompt_len, computed, _blocks(added)))
            else:
                blocks = None if added is None else _blocks(added)
                continued.append(Continued(self._aliases[req_id], computed, blocks))
        return Step(
            finished=finished,
            new=new,
            continued=continued,
            scheduled=[(self._aliases[req_id], count) for req_id, count in counts.items()],
            zeroed=list(output.new_block_ids_to_zero or ()),
            copies=[(each[0], each[1]) for each in output.kv_cache_block_copies or ()],
        )

    def order(self, req_ids: list[str]) -> list[int]:
        """The aliases of requests in the order of a batch."""
        return [self._aliases[req_id] for req_id in req_ids]

    def _renamed(self, req_id: str, finished: list[int]) -> int:
        """A fresh alias; the one that the request had, if any, is finished."""
        if req_id in self._aliases:
            finished.append(self._aliases[req_id])
        self._last_alias += 1
        self._aliases[req_id] = self._last_alias
        return self._last_alias


def _blocks(block_ids: tuple[list[int], ...]) -> list[list[int]]:
    return [list(group) for group in block_ids]


@dataclass(frozen=True)
class Limits:
    """What a lease allows: tokens and requests a step, tokens a request, its blocks and groups.

    `block_sizes` are tokens a block, by group.
    """

    max_tokens: int
    max_requests: int
    max_model_len: int
    num_blocks: int
    block_sizes: tuple[int, ...]

    @property
    def num_groups(self) -> int:
        return len(self.block_sizes)


class StepDecoder:
    """One lease's requests, as far as checking needs them: how many blocks each has."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: dict[int, list[int]] = {}

    def decode(self, step: Step) -> SchedulerOutput:
        """For vLLM's model runner. Raises StageRefused: the step breaks a bound, or cannot be."""
        for alias in step.finished:
            if self._held.pop(alias, None) is None:
                raise _bad(f"request {alias} ends and was never there")
        self._check_blocks(step.zeroed)
        for pair in step.copies:
            self._check_blocks(pair)
        computed = {each.alias: each.num_computed for each in (*step.new, *step.continued)}
        for each in step.new:
            self._add(each)
        for each in step.continued:
            self._extend(each)
        self._check_schedule(step, computed)
        return SchedulerOutput(
            scheduled_new_reqs=[_new_request(each) for each in step.new],
            scheduled_cached_reqs=_cached(step.continued),
            num_scheduled_tokens={str(alias): count for alias, count in step.scheduled},
            total_num_scheduled_tokens=step.num_tokens,
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            finished_req_ids={str(alias) for alias in step.finished},
            free_encoder_mm_hashes=[],
            new_block_ids_to_zero=step.zeroed or None,
            kv_cache_block_copies=[KVCacheBlockCopy(*pair) for pair in step.copies] or None,
        )

    def _add(self, request: NewRequest) -> None:
        if request.alias in self._held:
            raise _bad(f"request {request.alias} is new and was there already")
        if not 1 <= request.prompt_len <= self._limits.max_model_len:
            raise _bad(f"request {request.alias} of {request.prompt_len} prompt tokens")
        self._held[request.alias] = [0] * self._limits.num_groups
        self._hold(request.alias, request.blocks)

    def _extend(self, request: Continued) -> None:
        if request.alias not in self._held:
            raise _bad(f"request {request.alias} goes on and was never there")
        if request.blocks is not None:
            self._hold(request.alias, request.blocks)

    def _hold(self, alias: int, blocks: list[list[int]]) -> None:
        held = self._held[alias]
        if len(blocks) != len(held):
            raise _bad(f"blocks of {len(blocks)} groups, not {len(held)}")
        for group, ids in enumerate(blocks):
            self._check_blocks(ids)
            held[group] += len(ids)
            most = -(-self._limits.max_model_len // self._limits.block_sizes[group]) + 1
            if held[group] > most:
                raise _bad(f"request {alias} with {held[group]} blocks, at most {most}")

    def _check_blocks(self, ids: list[int] | tuple[int, ...]) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self._limits.num_blocks):
            raise _bad(f"a block that is not from 0 to {self._limits.num_blocks - 1}")

    def _check_schedule(self, step: Step, computed: dict[int, int]) -> None:
        limits = self._limits
        if len(step.scheduled) > limits.max_requests or len(self._held) > 4 * limits.max_requests:
            raise _bad(f"{len(step.scheduled)} requests, allowed are {limits.max_requests}")
        if len(computed) != len(step.new) + len(step.continued) or len(step.scheduled) != len(
            computed
        ):
            raise _bad("requests that are scheduled and not described, or twice")
        for alias, count in step.scheduled:
            first = computed.get(alias)
            if first is None or count < 1 or first < 0 or first + count > limits.max_model_len:
                raise _bad(f"request {alias}: {count} tokens from {first}")
        if step.num_tokens > limits.max_tokens:
            raise _bad(f"{step.num_tokens} tokens, allowed are {limits.max_tokens}")


def _bad(what: str) -> StageRefused:
    return StageRefused("", "step", f"a step that cannot be: {what}")


def _new_request(request: NewRequest) -> NewRequestData:
    return NewRequestData(
        req_id=str(request.alias),
        prompt_token_ids=[0] * request.prompt_len,
        mm_features=[],
        sampling_params=SamplingParams(temperature=0),
        pooling_params=None,
        block_ids=tuple(request.blocks),
        num_computed_tokens=request.num_computed,
        lora_request=None,
    )


def _cached(continued: list[Continued]) -> CachedRequestData:
    return CachedRequestData(
        req_ids=[str(each.alias) for each in continued],
        resumed_req_ids=set(),
        new_token_ids=[],
        all_token_ids={},
        new_block_ids=[None if each.blocks is None else tuple(each.blocks) for each in continued],
        num_computed_tokens=[each.num_computed for each in continued],
        num_output_tokens=[0] * len(continued),
    )
