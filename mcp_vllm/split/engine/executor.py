"""vLLM's in-process executor, whose worker has all layers but the span; the stage has those.

Chosen by class path (`distributed_executor_backend`); lives in the engine core's thread. To vLLM's
planner it presents two workers, as in pipeline parallelism: both get the same number of blocks, so
one block table is valid on both sides. To the scheduler it is one.

A lost stage is noticed inside a step. The step still passes through the local model runner, so that
its request states stay those of the scheduler; it ends in StageLostOutput, SplitScheduler preempts
what runs, and before the next step another stage or local layers take over.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from typing import Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput

from mcp_vllm.config.split import SplitConfig, parse_layers
from mcp_vllm.split import spans
from mcp_vllm.split.activations import DTYPES, Activations
from mcp_vllm.split.engine.cores import Core, take_cores
from mcp_vllm.split.engine.held import HeldLayers
from mcp_vllm.split.engine.kv_specs import decode_spec, in_dtype
from mcp_vllm.split.engine.layer_timer import LayerTimer
from mcp_vllm.split.engine.layers import AllButSpan, building
from mcp_vllm.split.engine.openmp import Helpers
from mcp_vllm.split.engine.scheduler import MovingOutput, StageLostOutput
from mcp_vllm.split.engine.slot_mapping import map_slots_alone
from mcp_vllm.split.engine.stage_pages import remote_layers
from mcp_vllm.split.engine.steps import StepEncoder
from mcp_vllm.split.engine.support import (
    agreed_facts,
    check_connector,
    check_dtypes,
    check_supported,
    num_layers,
    warn_if_slow,
)
from mcp_vllm.split.engine.takeover import AtStage, Takeover
from mcp_vllm.split.errors import SplitError, StageLost
from mcp_vllm.split.link import Link, Stages
from mcp_vllm.split.noise import ActivationNoise, NoisySessions, noisy_batch
from mcp_vllm.split.replan import Change, DecodeStep, Replanner
from mcp_vllm.split.watch import Watch
from mcp_vllm.split.wire import Hello, Step
from mcp_vllm.vllm_plugin.fingerprint import attention_packing
from mcp_vllm.vllm_plugin.remote_layers import announce
from mcp_vllm.vllm_plugin.split_settings import SETTINGS_KEY

logger = logging.getLogger(__name__)


class SplitExecutor(UniProcExecutor):
    """One local worker, and a stage.

    Attributes:
        last_step: what the last decode step took that a stage has answered, if `replan_s` is set.
    """

    def _init_executor(self) -> None:
        """Raises SplitError: this engine cannot be split, or no stage can be used."""
        config = self.vllm_config
        self._split = SplitConfig.load(config.additional_config[SETTINGS_KEY])
        check_supported(config)
        check_dtypes(config.model_config.dtype, self._split.stage_dtype)
        check_connector(config, self._split)
        self._plan = AllButSpan(*self._split.span, num_layers(config))
        self._link: Link | None = None
        self._lost: StageLost | None = None
        self._last: tuple[StageLost | None, str | None] = (None, None)
        self._failure: str | None = None
        self._timer: LayerTimer | None = None
        self._answered: tuple[float, float] | None = None
        self._proposed: Change | None = None
        self._change: Change | None = None
        self.last_step: DecodeStep | None = None
        self._watch: Watch | None = None
        self._nearest = ""
        self._number = 0
        self._step: Step | None = None
        self._counts: dict[str, int] = {}
        self._core = Core()
        self._helpers = Helpers()
        noise = self._split.noise
        self._noise = NoisySessions(ActivationNoise(**noise.model_dump())) if noise else None
        with building(self._plan):
            super()._init_executor()
        self._plan.gate.exchange = self._exchange
        packing = attention_packing() if config.kv_transfer_config is not None else None
        self._stages = Stages(self._split, self._hello(), config.model_config.dtype, packing)
        self._link = self._stages.connect()
        warn_if_slow(config, self.driver_worker.worker.device)
        self._encoder = StepEncoder()
        logger.info("layers %s run at stage %s", self._split.layers, self._link.stage)

    def get_kv_cache_specs(self) -> list[dict[str, KVCacheSpec]]:
        assert self._link is not None
        ours, theirs = self.vllm_config.model_config.dtype, self._stage_dtype
        remote = {
            name: in_dtype(decode_spec(spec), ours, theirs)
            for name, spec in self._link.welcome.kv_specs.items()
        }
        return [*super().get_kv_cache_specs(), remote]

    def determine_available_memory(self) -> list[int]:
        assert self._link is not None
        return [*super().determine_available_memory(), self._link.welcome.kv_bytes]

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        assert self._link is not None
        worker = self.driver_worker.worker
        self._held = HeldLayers(
            self.vllm_config, self._plan, worker, kv_cache_configs, self._stage_dtype
        )
        self._takeover = Takeover(self._split, self._stages, self._held)
        self._replanner = Replanner(self._split.replan_s, self._held.has_room)
        if self._split.replan_s:
            assert self._plan.layers is not None
            self._timer = LayerTimer([self._plan.layers[0]], worker.model_runner.device)
        self._link.init_kv(self._held.kv_init(self._split.span), self._split.load_ms / 1000)
        with_connector = self.vllm_config.kv_transfer_config is not None
        announce(remote_layers(*kv_cache_configs, self._present_link) if with_connector else None)
        super().initialize_from_config(kv_cache_configs)
        self._share_cores()

    def execute_model(
        self, scheduler_output: SchedulerOutput, non_block: bool = False
    ) -> ModelRunnerOutput | Future[ModelRunnerOutput | None] | None:
        if self._change is not None:
            self._move(self._change)
        if self._link is None and self._held.span is not None:
            self._take_over(scheduler_output)
        self._account(scheduler_output)
        self._flush_stores(scheduler_output)
        self._begin(scheduler_output)
        started = time.perf_counter()
        try:
            with self._core:
                result = super().execute_model(scheduler_output, non_block)
            self._observe(scheduler_output, time.perf_counter() - started)
            if self._lost is not None and scheduler_output.total_num_scheduled_tokens == 0:
                raise self._lost  # what was to be stored or loaded in this step was not
            return result
        except StageLost as error:
            self._note_loss(error)
            return _answer(StageLostOutput([], {}, failure=self._failure), non_block)
        finally:
            self._step = None

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        with self._core:
            output = super().sample_tokens(grammar_output, non_block)
        proposed, self._proposed = self._proposed, None
        if proposed is None or not isinstance(output, ModelRunnerOutput):
            return output
        self._change = proposed  # once the scheduler has preempted what runs, as this output asks
        _drop_transfers()
        return MovingOutput.of(output)

    def shutdown(self) -> None:
        for each in (getattr(self, "_link", None), getattr(self, "_watch", None)):
            if each is not None:
                each.close()
        announce(None)
        super().shutdown()

    def _flush_stores(self, output: SchedulerOutput) -> None:
        """Store what earlier steps have left, before the stage hears of this one's blocks. Also,
        the worker, which would do it later, must see every step: a loss is kept here."""
        if output.kv_connector_metadata is None or not has_kv_transfer_group():
            return
        try:
            get_kv_transfer_group().handle_preemptions(output.kv_connector_metadata)
        except StageLost as error:
            self._lost = error
            _drop_transfers()

    def _share_cores(self) -> None:
        """With the stage, if it has the same ones. What is bound stays so when the layers go on."""
        if self._link is not None and self._link.welcome.shares_cores:
            map_slots_alone()
            self._core = take_cores(from_last=False)
            self._helpers = Helpers.of_this_machine()

    def _present_link(self) -> Link:
        """For the connector, which reads and writes KV blocks at the stage."""
        if self._link is None or self._lost is not None:
            raise self._lost or StageLost("there is no stage")
        return self._link

    def _begin(self, output: SchedulerOutput) -> None:
        """Send the step ahead of its activations. A loss is kept until the model reaches the span:
        the worker must see every step."""
        if self._link is None or self._lost is not None:
            return
        self._number += 1
        self._step = self._encoder.encode(output)
        try:
            self._link.begin(self._number, self._step)
        except StageLost as error:
            self._lost = error

    def _account(self, output: SchedulerOutput) -> None:
        """What each request spends of its privacy, where noise is asked for."""
        self._counts = output.num_scheduled_tokens
        if self._noise is None:
            return
        for req_id in output.finished_req_ids:
            logger.info("request %s spent epsilon %.4g", req_id, self._noise.epsilon(req_id))
            self._noise.forget(req_id)

    def _exchange(self, activations: Activations) -> Activations:
        """The span's work, called by the model in the middle of a step.

        Raises StageLost.
        """
        if self._lost is not None:
            raise self._lost
        if self._step is None or self._link is None:
            return activations  # profiling: no step is in flight
        num_tokens = self._step.num_tokens
        runner = self.driver_worker.worker.model_runner
        req_ids = runner.input_batch.req_ids
        order = self._encoder.order(req_ids)
        hidden, residual = activations.hidden, activations.residual
        used = Activations(hidden[:num_tokens], None if residual is None else residual[:num_tokens])
        if self._noise is not None:
            used = noisy_batch(self._noise, used, {each: self._counts[each] for each in req_ids})
        started = time.perf_counter()
        try:
            self._link.announce()
            with self._helpers.resting():
                answer = self._link.run(self._number, order, used, self._helpers.call)
        except StageLost as error:
            self._lost = error  # what else is in this step need not try again
            raise
        self._answered = answer.stage_s, time.perf_counter() - started
        self._takeover.note_success()
        result = answer.activations
        if hidden.shape[0] == num_tokens:
            return result
        hidden[:num_tokens] = result.hidden
        if residual is not None:
            residual[:num_tokens] = result.residual
        return activations

    def _observe(self, output: SchedulerOutput, whole_s: float) -> None:
        """Let a decode step that a stage has answered count for the next plan."""
        answered, self._answered = self._answered, None
        if self._timer is None or set(output.num_scheduled_tokens.values()) != {1}:
            return
        if self._link is None:
            self._observe_at_home(whole_s, self._timer.seconds[0])
            return
        span = self._held.span
        if answered is None or span is None:
            return
        stage_s, exchange_s = answered
        step = DecodeStep(whole_s, self._timer.seconds[0], stage_s, exchange_s - stage_s)
        self.last_step = step
        held = parse_layers(self._link.welcome.layers)
        may_be_local = self._split.local_fallback
        self._proposed = self._replanner.observe(step, time.monotonic(), span, held, may_be_local)

    def _observe_at_home(self, whole_s: float, layer_s: float) -> None:
        """The same while all layers are here: the nearest stage might be worth going back to."""
        if self._watch is None:
            self._watch = Watch(self._split.stages, self._stages.ping, self._split.replan_s / 2)
        if not self._watch.round_trips:
            return
        stage, way_s = min(self._watch.round_trips.items(), key=lambda each: each[1])
        step = DecodeStep(whole_s, layer_s, 0.0, way_s)
        now = time.monotonic()
        self._proposed = self._replanner.observe_at_home(step, now, self._split.span)
        self._nearest = stage

    def _move(self, change: Change) -> None:
        """To a split that is better for good; the scheduler has preempted what ran."""
        link, self._change = self._link, None
        stage = self._nearest if link is None else link.stage
        wanted = None if change.span is None else AtStage(stage, change.span, again=True)
        logger.warning(
            "decode steps take %.1f ms and would take %.1f with %s: moving",
            change.now_s * 1000,
            change.then_s * 1000,
            "local layers"
            if change.span is None
            else f"layers {spans.text(change.span)} elsewhere",
        )
        if link is not None:
            link.close()
            self._link = None
        try:
            self._use(self._takeover.take(wanted))
        except SplitError as error:
            logger.warning("layers stay elsewhere: %s", error)

    def _note_loss(self, error: StageLost) -> None:
        if self._link is not None:
            logger.warning("stage %s is lost: %s", self._link.stage, error)
            self._link.close()
            self._last = error, self._link.stage
        self._link, self._lost = None, None
        _drop_transfers()

    def _take_over(self, output: SchedulerOutput) -> None:
        """Before a step that needs the layers, or their KV blocks, with nobody to have them."""
        loads = getattr(output.kv_connector_metadata, "load_jobs", None)
        if output.total_num_scheduled_tokens == 0 and not loads:
            return
        try:
            self._use(self._takeover.after(*self._last))
            self._failure = None
        except SplitError as error:
            self._failure = f"nobody can run layers {self._split.layers}: {error}"
            self._lost, self._last = StageLost(self._failure), (None, None)
            logger.error("%s: requests end with an error", self._failure)

    def _use(self, link: Link | None) -> None:
        self._link = link
        self._share_cores()
        self._last = None, None
        if link is not None and self._watch is not None:
            self._watch.close()
            self._watch = None
        self._encoder = StepEncoder()
        self._number = 0
        self._replanner.forget()

    @property
    def _stage_dtype(self) -> torch.dtype:
        name = self._split.stage_dtype
        ours: torch.dtype = self.vllm_config.model_config.dtype
        return ours if name is None else DTYPES[name]

    def _hello(self) -> Hello:
        config = self.vllm_config
        return Hello(
            facts=agreed_facts(config) | {"dtype": _name(self._stage_dtype)},
            max_model_len=config.model_config.max_model_len,
            max_requests=config.scheduler_config.max_num_seqs,
            max_tokens=config.scheduler_config.max_num_batched_tokens,
            form=self._split.form,
            dtype=_name(config.model_config.dtype),
        )


def _drop_transfers() -> None:
    """The scheduler starts over: see SplitScheduler."""
    if has_kv_transfer_group():
        get_kv_transfer_group().drop_transfers()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _answer(lost: StageLostOutput, non_block: bool) -> Any:
    if not non_block:
        return lost
    future: Future[Any] = Future()
    future.set_result(lost)
    return future
