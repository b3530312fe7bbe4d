"""Real measuring of both sides: the figures are of this model, plausible, and lead to a plan."""

import json

import pytest

from mcp_vllm.config.split import SplitConfig
from mcp_vllm.split.plan.cost import Load
from mcp_vllm.split.plan.fit import fit_machine
from mcp_vllm.split.plan.measure import MeasuringFailed, measure_here
from mcp_vllm.split.plan.partitioner import TaskPartitioner
from mcp_vllm.split.plan.read import read_model
from mcp_vllm.split.plan.request import MeasureRequest
from tests.integration.split_engine import Request
from tests.integration.split_parts import engine_of, play, split_of, stage_of

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LOAD = Load(prompt=200, answer=16, batch=2, budget=128)


@pytest.mark.parametrize(("family", "layers"), [("llama", "1:3"), ("gemma", "2:8")])
def test_a_stage_and_this_machine_are_measured_and_planned_for(family, layers, request) -> None:
    if family == "gemma":
        model = request.getfixturevalue("gemma_model")
    else:
        model = request.getfixturevalue("tiny_model")(family)
    with stage_of(model, layers, "--leases", "2", name=f"plan-{family}") as stage:
        places = {"local": "cpu", "cloud": f"mcp://{stage.address}"}
        plan = TaskPartitioner(str(model), places, load=LOAD, security={}).plan()
        for each in (plan.found.local, plan.found.remote):
            assert 0 < each.token_s < each.ttft_s * 20
        assert plan.best is not None
        assert json.loads(SplitConfig.model_dump_json(plan.split_config()))["stages"]
        if family == "llama":  # measuring leaves the stage as it was: an engine can use it
            settings = {"mcp_split": split_of(layers, stage.address)}
            played = play(engine_of(model) | settings, [Request(list(range(5, 45)), 8)])
            assert len(played.answers[0][0].tokens) == 8


def test_more_tokens_take_longer_in_what_is_measured(tiny_model) -> None:
    model = str(tiny_model("qwen3"))
    shape = read_model(model)
    figures = measure_here(MeasureRequest.of(model, shape.dtype, shape.num_layers, LOAD))
    assert {each.first for each in figures.layers} == set(range(shape.num_layers))
    fitted = fit_machine(figures, shape, "--local", as_stage=False)
    assert fitted.decode.layer_s + fitted.decode.byte_s > 0
    short, long = (
        sum(each.seconds for each in figures.layers if each.work.tokens == tokens)
        for tokens in (17, 128)
    )
    assert short < long


def test_a_model_that_vllm_refuses_is_said_with_its_words(tmp_path) -> None:
    request = MeasureRequest.of(str(tmp_path), "bfloat16", 4, LOAD)
    with pytest.raises(MeasuringFailed, match="--local"):
        measure_here(request)
