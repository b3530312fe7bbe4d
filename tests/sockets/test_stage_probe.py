"""A stage is measured with steps that a lease could have, and says its own times."""

import dataclasses
import itertools
from collections import Counter

import msgspec
import pytest
from machines import shape_of_layers
from stages_for_tests import (
    WIDTH,
    AddingLayers,
    MeasuredLease,
    dialled,
    running_stage,
    stages,
)

from mcp_vllm.config.split import SplitConfig
from mcp_vllm.split.errors import SplitError, StageRefused
from mcp_vllm.split.link import Link
from mcp_vllm.split.plan import stage_probe
from mcp_vllm.split.plan.cost import Load
from mcp_vllm.split.plan.fit import fit_link, fit_machine
from mcp_vllm.split.plan.stage_probe import probe_stage
from mcp_vllm.split.wire import Step

LOAD = Load(prompt=90, answer=10, batch=4, budget=64)
SHAPE = dataclasses.replace(shape_of_layers(5), hidden=WIDTH)


@pytest.fixture(autouse=True)
def _steps_do_not_wait(monkeypatch):
    monkeypatch.setattr(stage_probe, "WAIT_S", 0.0)


def probe(address: str, shape=SHAPE, **settings):
    config = SplitConfig.load({"layers": "1:2", "stages": [address], **settings})
    return probe_stage(config, shape, LOAD)


def test_figures_are_what_the_stage_says_of_its_layers() -> None:
    with running_stage() as stage:
        figures, transfers = probe(stage.address)
    assert figures.kind == "stage"
    assert figures.memory_bytes == 1 << 30
    assert {(each.first, each.end) for each in figures.layers} == {(1, 2), (2, 3)}
    said = dict(enumerate(MeasuredLease.LAYER_S, 1))
    assert all(each.seconds == pytest.approx(said[each.first]) for each in figures.layers)
    works = {each.work for each in figures.layers}
    assert {each.requests for each in works if each.is_decode} == {1, 2, 4}
    assert {each.tokens for each in works if not each.is_decode} == {16, 64}
    assert max(each.context for each in works) == LOAD.context
    assert max(each.bytes for each in transfers.transfers) == 64 * WIDTH * 2 * 2 * 2
    fitted = fit_machine(figures, SHAPE, "--cloud", as_stage=True)
    assert fitted.decode.layer_time_s(SHAPE.layers[1], next(iter(works))) < 1e-4
    assert fit_link(transfers).rtt_s > 0


@pytest.mark.parametrize("shares_cores", [False, True])
def test_cores_that_a_stage_shares_compute_while_it_waits(shares_cores, monkeypatch) -> None:
    welcome = msgspec.structs.replace(MeasuredLease.welcome, shares_cores=shares_cores)
    monkeypatch.setattr(MeasuredLease, "welcome", welcome)
    computed, idle = [], []
    compute = stage_probe._compute
    monkeypatch.setattr(stage_probe, "_compute", lambda *args: computed.append(compute(*args)))
    monkeypatch.setattr(stage_probe, "_idle", lambda: idle.append(None))
    announced, announce = [], Link.announce
    monkeypatch.setattr(Link, "announce", lambda link: announced.append(announce(link)))
    with running_stage() as stage:
        probe(stage.address)
        num_steps = len(stage.backend.measured.steps)
    assert len(announced) == num_steps  # as an engine does
    assert (len(computed), len(idle)) == ((num_steps, 0) if shares_cores else (0, num_steps))


def test_every_step_is_one_that_an_engine_could_send() -> None:
    with running_stage() as stage:
        probe(stage.address)
        lease = stage.backend.measured
    assert lease is not None
    held: dict[int, tuple[int, int]] = {}  # alias: tokens computed, tokens that its blocks hold
    for step in lease.steps:
        for alias in step.finished:
            del held[alias]
        used = [block for each in step.new for group in each.blocks for block in group]
        assert len(used) == len(set(used))
        assert not used or 0 < min(used) <= max(used) < lease.kv_init.num_blocks
        for each in step.new:
            held[each.alias] = (each.num_computed, 16 * len(each.blocks[0]))
        for each in step.continued:
            assert held[each.alias][0] == each.num_computed
        check_counts(step, held)


def test_each_kind_of_step_is_timed_several_times_with_others_between() -> None:
    with running_stage() as stage:
        probe(stage.address)
        steps = stage.backend.measured.steps
    prefills = [step.new[0] for step in steps if step.new and step.scheduled[0][1] > 1]
    kinds = [(each.num_computed, each.prompt_len) for each in prefills]
    rows = [kind for kind, _ in itertools.groupby(kinds)]
    assert len(set(rows)) > 2
    assert set(Counter(rows).values()) == {stage_probe._ROUNDS}


def check_counts(step: Step, held: dict[int, tuple[int, int]]) -> None:
    for alias, count in step.scheduled:
        computed, room = held[alias]
        assert computed + count <= room
        held[alias] = (computed + count, room)


def test_the_lease_ends_with_the_measuring() -> None:
    with running_stage() as stage:
        probe(stage.address)
        probe(stage.address)  # would be refused as busy


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"hidden": 16}, "width 8"), ({"dtype": "float16"}, "computes in bfloat16")],
)
def test_a_stage_of_another_model_is_refused(changes, said) -> None:
    with running_stage() as stage, pytest.raises(SplitError, match=said):
        probe(stage.address, dataclasses.replace(SHAPE, **changes))


def test_a_stage_without_a_free_lease_says_so() -> None:
    backend = AddingLayers(max_leases=0)
    with running_stage(backend) as stage, pytest.raises(StageRefused, match="leases are taken"):
        probe(stage.address, load_ms=1000)


def test_who_does_not_measure_must_have_the_stage_s_model() -> None:
    with running_stage() as stage:
        ordinary = stages(stage.address, hello=_hello_of_another_model())
        with pytest.raises(StageRefused, match="not what this stage holds"):
            dialled(ordinary)


def _hello_of_another_model():
    import msgspec
    from stages_for_tests import HELLO

    return msgspec.structs.replace(HELLO, facts={**HELLO.facts, "dtype": "float16"})
