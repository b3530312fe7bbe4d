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

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput

from mcp_vllm.config.split import SplitConfig
from mcp_vllm.split.activations import Activations
from mcp_vllm.split.engine.kv_specs import decode_spec, encode_group
from mcp_vllm.split.engine.layers import AllButSpan, building
from mcp_vllm.split.engine.local import LocalLayers
from mcp_vllm.split.engine.scheduler import StageLostOutput
from mcp_vllm.split.engine.steps import StepEncoder
from mcp_vllm.split.engine.support import agreed_facts, check_supported, num_layers
from mcp_vllm.split.errors import SplitError, StageLost
from mcp_vllm.split.link import Link, Stages
from mcp_vllm.split.wire import Hello, KvInit, Step
from mcp_vllm.vllm_plugin.split_settings import SETTINGS_KEY

logger = logging.getLogger(__name__)


class SplitExecutor(UniProcExecutor):
    """One local worker, and a stage."""

    def _init_executor(self) -> None:
        """Raises SplitError: this engine cannot be split, or no stage can be used."""
        config = self.vllm_config
        self._split = SplitConfig.load(config.additional_config[SETTINGS_KEY])
        check_supported(config)
        self._plan = AllButSpan(*self._split.span, num_layers(config))
        self._link: Link | None = None
        self._lost: StageLost | None = None
        self._is_local = False
        self._number = 0
        self._step: Step | None = None
        with building(self._plan):
            super()._init_executor()
        self._plan.span.exchange = self._exchange
        self._stages = Stages(self._split, self._hello(), config.model_config.dtype)
        self._link = self._stages.connect(patient=True)
        self._kv_specs = self._link.welcome.kv_specs
        self._encoder = StepEncoder()
        logger.info("layers %s run at stage %s", self._split.layers, self._link.stage)

    def get_kv_cache_specs(self) -> list[dict[str, KVCacheSpec]]:
        remote = {name: decode_spec(spec) for name, spec in self._kv_specs.items()}
        return [*super().get_kv_cache_specs(), remote]

    def determine_available_memory(self) -> list[int]:
        assert self._link is not None
        return [*super().determine_available_memory(), self._link.welcome.kv_bytes]

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        self._kv_cache_configs = kv_cache_configs
        assert self._link is not None
        self._link.init_kv(self._kv_init(), self._split.load_ms / 1000)
        super().initialize_from_config(kv_cache_configs)

    def execute_model(
        self, scheduler_output: SchedulerOutput, non_block: bool = False
    ) -> ModelRunnerOutput | Future[ModelRunnerOutput | None] | None:
        if self._link is None and not self._is_local:
            self._take_over()
        self._begin(scheduler_output)
        try:
            return super().execute_model(scheduler_output, non_block)
        except StageLost as error:
            self._note_loss(error)
            return _answer(non_block)
        finally:
            self._step = None

    def shutdown(self) -> None:
        if getattr(self, "_link", None) is not None:
            self._link.close()
        super().shutdown()

    def _begin(self, output: SchedulerOutput) -> None:
        """Send the step ahead of its activations. A loss is kept until the model reaches the span:
        the worker must see every step."""
        if self._is_local or self._lost is not None:
            return
        assert self._link is not None
        self._number += 1
        self._step = self._encoder.encode(output)
        try:
            self._link.begin(self._number, self._step)
        except StageLost as error:
            self._lost = error

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
        order = self._encoder.order(runner.input_batch.req_ids)
        hidden, residual = activations.hidden, activations.residual
        used = Activations(hidden[:num_tokens], None if residual is None else residual[:num_tokens])
        result = self._link.run(self._number, order, used)
        if hidden.shape[0] == num_tokens:
            return result
        hidden[:num_tokens] = result.hidden
        if residual is not None:
            residual[:num_tokens] = result.residual
        return activations

    def _note_loss(self, error: StageLost) -> None:
        assert self._link is not None
        logger.warning("stage %s is lost: %s", self._link.stage, error)
        self._link.close()
        self._link, self._lost = None, None

    def _take_over(self) -> None:
        """A lease at another stage, or the layers themselves. Raises SplitError: neither."""
        started = time.monotonic()
        try:
            self._link = self._connect_again()
            where = f"stage {self._link.stage}"
        except SplitError as error:
            if not self._split.local_fallback:
                raise SplitError(f"{error}; local_fallback is off") from error
            logger.warning("%s: the layers are loaded here", error)
            LocalLayers(self.vllm_config, self._plan).load(
                self.driver_worker, self._kv_cache_configs
            )
            self._is_local = True
            where = "local layers"
        logger.warning(
            "layers %s: %s took over after %.2f s; running requests are recomputed",
            self._split.layers,
            where,
            time.monotonic() - started,
        )

    def _connect_again(self) -> Link:
        link = self._stages.connect(patient=False)
        try:
            if link.welcome.kv_specs != self._kv_specs:
                raise SplitError(f"stage {link.stage} has other attention layers")
            link.init_kv(self._kv_init(), self._split.connect_ms / 1000)
        except BaseException:
            link.close()
            raise
        self._encoder = StepEncoder()
        self._number = 0
        return link

    def _kv_init(self) -> KvInit:
        remote = self._kv_cache_configs[1]
        return KvInit(
            num_blocks=remote.num_blocks,
            layout=remote.kv_cache_layout,
            groups=[encode_group(group) for group in remote.kv_cache_groups],
            hash_block_size=remote.hash_block_size,
            alignment=remote.cache_hit_alignment_tokens,
        )

    def _hello(self) -> Hello:
        config = self.vllm_config
        return Hello(
            facts=agreed_facts(config, self._split.span),
            max_model_len=config.model_config.max_model_len,
            max_requests=config.scheduler_config.max_num_seqs,
            max_tokens=config.scheduler_config.max_num_batched_tokens,
            form=self._split.form,
        )


def _answer(non_block: bool) -> Any:
    lost = StageLostOutput(req_ids=[], req_id_to_index={})
    if not non_block:
        return lost
    future: Future[Any] = Future()
    future.set_result(lost)
    return future
