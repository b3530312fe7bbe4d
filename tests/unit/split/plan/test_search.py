"""The search against brute force over the written-out formulas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import machine, shape_of_layers

from mcp_vllm.split.plan.cost import CostModel, Load
from mcp_vllm.split.plan.fit import LinkFit
from mcp_vllm.split.plan.search import LOCAL_RESERVE, Limits, all_splits, search
from mcp_vllm.split.plan.shape import ModelShape, Work

MIB = 1 << 20
LINKS = st.builds(LinkFit, st.floats(0, 0.2), st.floats(1e-10, 1e-6))
LOADS = st.builds(
    Load, st.integers(1, 3000), st.integers(1, 400), st.integers(1, 16), st.sampled_from([64, 2048])
)
SHAPES = st.builds(shape_of_layers, st.integers(3, 12))
SPEEDS = st.floats(0.1, 50)
LIMITS = st.builds(Limits, st.integers(MIB, 400 * MIB), st.integers(MIB, 400 * MIB))


def written_out_step_s(model, local, stage, link, work: Work, split, form) -> float:
    seconds = local.rest_s(work)
    for i, layer in enumerate(model.layers):
        where = stage if split and split[0] <= i < split[1] else local
        rates = where.rates(work)
        compute, read = layer.flops(work) * rates.flop_s, layer.bytes_read(work) * rates.byte_s
        seconds += max(compute, read) + rates.layer_s
    if split:
        seconds += local.resume_s + stage.rest_s(work) + stage.resume_s
        cost = model.forms[form]
        token_s = cost.token_bytes * link.byte_s + cost.token_s
        seconds += link.rtt_s + 2 * (work.num_tokens * token_s + cost.way_s)
    return seconds


@given(SHAPES, SPEEDS, LINKS, LOADS, LIMITS, st.sampled_from(["fold", "packed"]))
def test_the_best_is_the_best_of_all_that_are_written_out(
    shape: ModelShape, speed: float, link: LinkFit, load: Load, limits: Limits, form: str
) -> None:
    local, stage = machine(), machine(speed, 2e-4)
    found = search(CostModel(shape, local, stage, link, form), load, limits)
    best_s = None
    for split in [None, *all_splits(shape.num_layers)]:
        inside = range(*split) if split else range(0)
        here, there = shape.outer_bytes, 0
        for i, layer in enumerate(shape.layers):
            size = layer.weight_bytes + load.batch * (load.prompt + load.answer) * layer.kv_bytes
            here, there = (here, there + size) if i in inside else (here + size, there)
        if here > int(limits.local_bytes * (1 - LOCAL_RESERVE)) or there > limits.stage_bytes:
            continue
        args = (shape, local, stage, link)
        ttft = computed = 0.0
        while computed < load.prompt:
            tokens = int(min(load.budget, load.prompt - computed))
            computed += tokens
            ttft += written_out_step_s(*args, Work(1, tokens, int(computed)), split, form)
        token = written_out_step_s(
            *args, Work(load.batch, 1, load.prompt + max(1, load.answer // 2)), split, form
        )
        request_s = ttft + (load.answer - 1) * token
        best_s = request_s if best_s is None else min(best_s, request_s)
    assert (found.best is None) == (best_s is None)
    if found.best is not None:
        assert found.best.request_s == pytest.approx(best_s, rel=1e-9)


@given(SHAPES, SPEEDS, LINKS, LOADS, LIMITS)
def test_what_is_chosen_keeps_to_both_memories(shape, speed, link, load, limits) -> None:
    found = search(CostModel(shape, machine(), machine(speed), link), load, limits)
    for each in (found.best, found.best_split):
        if each is not None:
            assert each.local_bytes <= limits.local_bytes * (1 - LOCAL_RESERVE)
            assert each.stage_bytes <= limits.stage_bytes
    if found.best is None:
        assert not any(each.fits for each in (found.local, *found.splits))


@given(SHAPES, SPEEDS, LINKS, LOADS, LIMITS, st.floats(1, 100))
def test_more_bandwidth_never_makes_the_best_slower(
    shape, speed, link, load, limits, times
) -> None:
    quicker = LinkFit(link.rtt_s, link.byte_s / times)
    slow, quick = (
        search(CostModel(shape, machine(), machine(speed), each), load, limits)
        for each in (link, quicker)
    )
    if slow.best is not None:
        assert quick.best is not None
        assert quick.best.request_s <= slow.best.request_s * (1 + 1e-9)


@given(SHAPES, LOADS)
def test_memory_of_both_sides_adds_up_whatever_the_split(shape: ModelShape, load: Load) -> None:
    model = CostModel(shape, machine(), machine(), LinkFit(0, 0))
    whole = model.local_bytes(load, None)
    for split in all_splits(shape.num_layers):
        assert model.local_bytes(load, split) + model.stage_bytes(load, split) == whole


def test_a_quick_stage_on_a_quick_link_takes_all_it_can() -> None:
    shape = shape_of_layers(8)
    found = search(
        CostModel(shape, machine(), machine(100, 0), LinkFit(1e-5, 1e-10)),
        Load(512, 64, 1, 2048),
        Limits(1 << 40, 1 << 40),
    )
    assert found.pays
    assert found.best == found.remote
    assert found.remote.split == (1, 7)


def test_a_slow_link_does_not_pay_unless_memory_asks_for_it() -> None:
    shape = shape_of_layers(8)
    model = CostModel(shape, machine(), machine(), LinkFit(0.1, 1e-6))
    load = Load(512, 64, 1, 2048)
    found = search(model, load, Limits(1 << 40, 1 << 40))
    assert not found.pays
    assert found.best == found.local
    short = search(model, load, Limits(int(found.local.local_bytes * 1.2), 1 << 40))
    assert short.pays
    assert not short.local.fits


def test_steps_of_a_prompt_are_its_chunks() -> None:
    assert Load(600, 10, 4, 256).prefill == [
        Work(1, 256, 256),
        Work(1, 256, 512),
        Work(1, 88, 600),
    ]
    assert Load(256, 10, 4, 256).prefill == [Work(1, 256, 256)]
    assert Load(600, 10, 4, 256).decode == Work(4, 1, 605)


def test_the_budget_is_the_largest_whose_step_is_short_enough() -> None:
    model = CostModel(shape_of_layers(4), machine())
    load = Load(500, 10, 1, 2048)
    limit = model.step_s(Work(1, 160, 500), None)
    assert model.budget_within(load, None, limit * 1.0001) == 160
    assert model.budget_within(load, None, 1e-9) is None
    assert model.budget_within(load, None, 1e9) == 500


def test_two_layers_cannot_be_split() -> None:
    model = CostModel(shape_of_layers(2), machine(), machine(), LinkFit(0, 0))
    with pytest.raises(ValueError, match="3 are the least"):
        search(model, Load(10, 10, 1, 64), Limits(1 << 40, 1 << 40))
