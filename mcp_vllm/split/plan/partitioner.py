"""`TaskPartitioner`: from a model and two places to a plan. Public; `mcp-vllm plan` is its command.

partitioner = TaskPartitioner("my-model", {"local": "cpu", "cloud": "mcp://gpu-01:7090"})
plan = partitioner.plan()
plan.write_split_config(Path("split.yaml"), ["gpu-01:7090"])   # vllm serve --mcp-split split.yaml
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mcp_vllm.config.address import Address
from mcp_vllm.config.split import SplitConfig
from mcp_vllm.split.activations import EXACT_FORMS, FORMS
from mcp_vllm.split.errors import SplitError
from mcp_vllm.split.plan.cost import CostModel, Load
from mcp_vllm.split.plan.figures import Figures, read_figures
from mcp_vllm.split.plan.fit import LinkFit, MachineFit, fit_link, fit_machine
from mcp_vllm.split.plan.measure import measure_here
from mcp_vllm.split.plan.read import read_model
from mcp_vllm.split.plan.request import MeasureRequest
from mcp_vllm.split.plan.search import Candidate, Found, Limits, search
from mcp_vllm.split.plan.shape import ModelShape
from mcp_vllm.split.plan.stage_probe import probe_stage

SCHEME = "mcp://"
DEFAULT_LOAD = Load(prompt=512, answer=128, batch=1, budget=2048)
AUTO = "auto"
# A form that changes results a little must save this part of a request's time.
_WORTH = 0.1
_DEVICES = ("measure", "cpu", "cuda", "xpu")


class PlanError(SplitError):
    """Something that cannot be planned as it was asked; names the flag."""


@dataclass(frozen=True)
class Plan:
    """What was found, and from what.

    Attributes:
        model: as it was given.
        stage: HOST:PORT that was measured; None: figures came from a file.
        notes: sentences about what makes it slow.
    """

    model: str
    shape: ModelShape
    load: Load
    form: str
    limits: Limits
    local: MachineFit
    cloud: MachineFit
    link: LinkFit
    found: Found
    costs: CostModel
    stage: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Candidate | None:
        """The quickest that fits: a split, or everything local; None: nothing fits."""
        return self.found.best

    def reduce_cloud_load(self, factor: float = 0.8) -> Plan:
        """The plan again with at most `factor` of the best split's memory at the stage, as after a
        stage has run out of it.

        Raises PlanError: there is no split to reduce.
        """
        if self.found.best_split is None:
            raise PlanError("no split fits: there is no cloud share to reduce")
        stage_bytes = int(self.found.best_split.stage_bytes * factor)
        limits = dataclasses.replace(self.limits, stage_bytes=stage_bytes)
        return dataclasses.replace(self, limits=limits, found=search(self.costs, self.load, limits))

    def batch_tokens(self, step_s: float) -> int | None:
        """Tokens a step may take for steps of the best split to be that short; None: no number."""
        best = self.found.best_split
        return None if best is None else self.costs.budget_within(self.load, best.split, step_s)

    def split_config(self, stages: Sequence[str] = (), **settings: Any) -> SplitConfig:
        """The best split as settings of `--mcp-split`.

        Args:
            stages: HOST:PORT each; empty: the one that was measured.
            settings: other keys of the file, as `tls`.

        Raises:
            PlanError: no split fits, or no stage is known.
            ConfigError: a setting is wrong, as a far stage without TLS.
        """
        best = self.found.best_split
        if best is None or best.split is None:
            raise PlanError("no split fits the memory of both sides: nothing to write")
        stages = stages or ([self.stage] if self.stage else [])
        if not stages:
            raise PlanError("--stage: name the HOST:PORT that will hold the layers")
        first, end = best.split
        return SplitConfig.load(
            {**settings, "layers": f"{first}:{end}", "stages": list(stages), "form": self.form}
        )

    def write_split_config(self, path: Path, stages: Sequence[str] = (), **settings: Any) -> None:
        """Raises what `split_config` raises, and PlanError: the file cannot be written."""
        config = self.split_config(stages, **settings)
        text = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False)
        try:
            path.write_text(f"# mcp-vllm plan {self.model}\n{text}", encoding="utf-8")
        except OSError as error:
            raise PlanError(f"--write {path}: {error.strerror}") from error


class TaskPartitioner:
    """Plans where to split one model.

    Args:
        model: folder, or name on the Hub.
        device_map: "local" is a device of this machine ("cpu", "cuda:0": measured when
            planning) or a file of figures; "cloud" is a stage (mcp://HOST:PORT, measured) or a
            file of figures.
        load: what to plan for.
        link: of the two; None: measured through the stage.
        form: of activations on the wire; `auto`: the exactest that is hardly slower than any.
        dtype: of activations and KV; None: the model's.
        local_bytes, cloud_bytes: memory; None: what the figures say.
        security: keys `tls`, `token_file`, `insecure` of --mcp-split for the connection.

    Raises:
        PlanError: a place is missing or not understood.
    """

    def __init__(
        self,
        model: str,
        device_map: Mapping[str, str],
        *,
        load: Load = DEFAULT_LOAD,
        link: LinkFit | None = None,
        form: str = "raw",
        dtype: str | None = None,
        local_bytes: int | None = None,
        cloud_bytes: int | None = None,
        security: Mapping[str, Any] | None = None,
    ) -> None:
        if set(device_map) != {"local", "cloud"}:
            raise PlanError(f'device_map needs "local" and "cloud", not {sorted(device_map)}')
        self._model = model
        self._places = dict(device_map)
        self._load = load
        self._link = link
        self._form = form
        self._dtype = dtype
        self._local_bytes = local_bytes
        self._cloud_bytes = cloud_bytes
        self._security = dict(security or {})

    def plan(self) -> Plan:
        """Measure what has to be, and search.

        Raises SplitError (PlanError, FiguresError, MeasuringFailed, ModelUnreadable, StageRefused),
        ConfigError and SecurityError; each names what is at fault.
        """
        shape = read_model(self._model, self._dtype)
        cloud, link, stage = self._measure_cloud(shape)
        local = self._measure_local(shape)
        here = fit_machine(local, shape, "--local", as_stage=False)
        there = fit_machine(cloud, shape, "--cloud", as_stage=True)
        limits = Limits(
            self._local_bytes or local.memory_bytes, self._cloud_bytes or cloud.memory_bytes
        )
        both = local.slow_because("--local"), cloud.slow_because("--cloud")
        notes = tuple(each for each in both if each is not None)
        plans = []
        for form in FORMS if self._form == AUTO else (self._form,):
            costs = CostModel(shape, here, there, link, form)
            try:
                found = search(costs, self._load, limits)
            except ValueError as error:
                raise PlanError(f"{self._model}: {error}") from error
            plans.append(
                Plan(
                    self._model,
                    shape,
                    self._load,
                    form,
                    limits,
                    here,
                    there,
                    link,
                    found,
                    costs,
                    stage,
                    notes,
                )
            )
        return _exactest(plans)

    def _measure_local(self, shape: ModelShape) -> Figures:
        place = self._places["local"]
        if place.partition(":")[0] not in _DEVICES:
            return read_figures(Path(place), "--local")
        request = MeasureRequest.of(self._model, shape.dtype, shape.num_layers, self._load)
        stage = self._places["cloud"]
        beside = stage.startswith(SCHEME) and Address.parse(stage.removeprefix(SCHEME)).is_loopback
        return measure_here(request, shares_cores=beside)

    def _measure_cloud(self, shape: ModelShape) -> tuple[Figures, LinkFit, str | None]:
        place = self._places["cloud"]
        if not place.startswith(SCHEME):
            if self._link is None:
                raise PlanError(
                    "--link: give RTT and bandwidth, as in 20ms,100Mbit: only a running stage "
                    "(--cloud HOST:PORT) can measure them"
                )
            return read_figures(Path(place), "--cloud"), self._link, None
        stage = place.removeprefix(SCHEME)
        config = SplitConfig.load({**self._security, "layers": "1:2", "stages": [stage]})
        figures, transfers = probe_stage(config, shape, self._load)
        return figures, self._link or fit_link(transfers), stage


def _exactest(plans: Sequence[Plan]) -> Plan:
    """The first of the plans, which become less exact, that no other one beats by much; of those
    that change nothing the quickest."""
    exact = [each for each in plans if each.form in EXACT_FORMS]
    others = [each for each in plans if each.form not in EXACT_FORMS]
    candidates = [*([min(exact, key=_request_s)] if exact else []), *others]
    quickest = min(map(_request_s, candidates)) / (1 - _WORTH)
    return next(each for each in candidates if _request_s(each) <= quickest)


def _request_s(plan: Plan) -> float:
    best = plan.found.best_split
    return math.inf if best is None else best.request_s
