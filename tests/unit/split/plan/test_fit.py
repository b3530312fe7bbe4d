"""Fits find the rates that made the figures, also when some figures are off."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from machines import WORKS, figures_of, machine, shape_of_layers
from pydantic import ValidationError

from mcp_vllm.split.plan.figures import (
    Figures,
    FiguresError,
    LinkFigures,
    Transfer,
    read_figures,
    typical,
    typical_layers,
    write_figures,
)
from mcp_vllm.split.plan.fit import LinkFit, fit_link, fit_machine
from mcp_vllm.split.plan.link_text import parse_link
from mcp_vllm.split.plan.shape import Work

SHAPE = shape_of_layers(6)
NEW = [Work(1, 128, 400), Work(4, 1, 900), Work(1, 40, 40)]


@pytest.mark.parametrize("speed", [0.2, 1.0, 30.0])
def test_unseen_steps_are_predicted_from_figures_of_a_roofline(speed: float) -> None:
    true = machine(speed)
    fitted = fit_machine(figures_of(true, SHAPE, WORKS), SHAPE, "--local", as_stage=False)
    for work in NEW:
        for layer in SHAPE.layers:
            expected = true.rates(work).layer_time_s(layer, work)
            assert fitted.rates(work).layer_time_s(layer, work) == pytest.approx(expected, rel=0.03)
        assert fitted.rest_s(work) == pytest.approx(true.rest_s(work), rel=0.01)
    assert fitted.prefill.error < 0.02


def test_a_few_disturbed_figures_do_not_draw_the_fit_away() -> None:
    true = machine()
    figures = figures_of(true, SHAPE, WORKS)
    layers = [
        each.model_copy(update={"seconds": each.seconds * 20}) if i % 9 == 0 else each
        for i, each in enumerate(figures.layers)
    ]
    disturbed = figures.model_copy(update={"layers": layers})
    fitted = fit_machine(disturbed, SHAPE, "--local", as_stage=False)
    for work in NEW:
        expected = true.rates(work).layer_time_s(SHAPE.layers[0], work)
        assert fitted.rates(work).layer_time_s(SHAPE.layers[0], work) == pytest.approx(
            expected, rel=0.1
        )


def test_rates_are_never_negative() -> None:
    figures = figures_of(machine(), SHAPE, WORKS)
    layers = [each.model_copy(update={"seconds": 1e-3 / each.context}) for each in figures.layers]
    fitted = fit_machine(
        figures.model_copy(update={"layers": layers}), SHAPE, "--local", as_stage=False
    )
    for rates in (fitted.prefill, fitted.decode):
        assert min(rates.flop_s, rates.byte_s, rates.layer_s) >= 0


def test_an_engine_s_own_work_is_not_a_stage_s() -> None:
    figures = figures_of(machine(), SHAPE, WORKS)
    assert fit_machine(figures, SHAPE, "--cloud", as_stage=True).rest_s(NEW[0]) == 0
    figures = figures_of(machine(), SHAPE, WORKS, kind="stage")
    assert fit_machine(figures, SHAPE, "--cloud", as_stage=True).rest_s(NEW[0]) > 0


def test_a_link_is_found_from_its_transfers() -> None:
    true = LinkFit(0.02, 8 / 100e6)
    fitted = fit_link(transfers_over(true, 2_000, 60_000, 1_300_000))
    assert fitted.rtt_s == pytest.approx(true.rtt_s, rel=1e-3)
    assert fitted.byte_s == pytest.approx(true.byte_s, rel=1e-3)
    assert fitted.burst_bytes == 0


def test_a_burst_that_passes_at_once_is_no_part_of_the_round_trip() -> None:
    true = LinkFit(0.0015, 8 / 100e6, burst_bytes=11_000)
    sizes = (8_000, 16_000, 33_000, 131_000, 524_000, 1_300_000)
    fitted = fit_link(transfers_over(true, *sizes))
    assert fitted.rtt_s == pytest.approx(true.rtt_s, rel=0.05)
    for num_bytes in (5_000, 50_000, 3_000_000):
        assert fitted.time_s(num_bytes) == pytest.approx(true.time_s(num_bytes), rel=0.05)


def transfers_over(link: LinkFit, *sizes: int) -> LinkFigures:
    return LinkFigures(transfers=[Transfer(bytes=n, seconds=link.time_s(n)) for n in sizes])


def test_figures_survive_a_file(tmp_path: Path) -> None:
    figures = figures_of(machine(), SHAPE, WORKS)
    write_figures(tmp_path / "here.json", figures)
    assert read_figures(tmp_path / "here.json", "--local") == figures


TIME = {"requests": 1, "tokens": 1, "context": 4, "seconds": 1, "first": 0, "end": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "version"),
        ({"memory_bytes": -1}, "memory_bytes"),
        ({"dtypes": ["int4"]}, "dtypes"),
        ({"surprise": 1}, "surprise"),
        ({"layers": []}, "layers"),
        ({"layers": [TIME | {"tokens": 5}]}, "new tokens"),
        ({"layers": [TIME | {"seconds": 1e999}]}, "seconds"),
        ({"layers": [TIME | {"first": 3}]}, "layers"),
    ],
)
def test_a_file_that_cannot_be_is_refused_with_the_key(tmp_path, changes, said) -> None:
    made = figures_of(machine(), SHAPE, WORKS).model_dump() | changes
    with pytest.raises(ValidationError):
        Figures.model_validate(made)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(made))
    with pytest.raises(FiguresError, match=said) as caught:
        read_figures(path, "--cloud")
    assert "--cloud" in str(caught.value)
    assert "bad.json" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FiguresError, match=r"--local .*none\.json"):
        read_figures(tmp_path / "none.json", "--local")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden": 640}, "width 640"),
        ({"dtype": "float32"}, "measured in float32"),
    ],
)
def test_figures_of_another_model_or_dtype_are_refused(changes, said) -> None:
    figures = figures_of(machine(), SHAPE, WORKS, **changes)
    with pytest.raises(FiguresError, match=f"--cloud.*{said}"):
        fit_machine(figures, SHAPE, "--cloud", as_stage=True)


def test_a_machine_without_instructions_for_the_dtype_is_said_to_be_slow() -> None:
    assert figures_of(machine(), SHAPE, WORKS).slow_because("--local") is None
    slow = figures_of(machine(), SHAPE, WORKS, dtypes=["float32", "float16"])
    fit_machine(slow, SHAPE, "--cloud", as_stage=True)
    said = slow.slow_because("--cloud")
    assert said is not None
    assert said.startswith("--cloud: made-up does not compute in bfloat16, only in float32, float1")


@pytest.mark.parametrize("kind", ["engine", "stage"])
def test_what_the_first_layer_takes_more_is_the_step_s(kind: str) -> None:
    """0.7 ms, and in every third step more: the others are as quick as without it."""
    true = machine()
    figures = figures_of(true, SHAPE, WORKS, kind=kind)
    layers = [
        each.model_copy(update={"seconds": each.seconds + 7e-4 * (1 + (each.requests == 8))})
        if each.first == 0
        else each
        for each in figures.layers
    ]
    changed = figures.model_copy(update={"layers": layers})
    as_stage = kind == "stage"
    fitted = fit_machine(changed, SHAPE, "--local", as_stage=as_stage)
    usual = fit_machine(figures, SHAPE, "--local", as_stage=as_stage)
    for work in NEW:
        seconds = fitted.rates(work).layer_time_s(SHAPE.layers[0], work)
        assert seconds == pytest.approx(
            true.rates(work).layer_time_s(SHAPE.layers[0], work), rel=0.03
        )
        more = fitted.rest_s(work) - usual.rest_s(work)
        assert more == pytest.approx(0 if as_stage else 7e-4, rel=0.1, abs=1e-9)
    assert fitted.resume_s - true.resume_s == pytest.approx(7e-4 if as_stage else 0, rel=0.01)


def test_a_first_layer_of_a_shape_of_its_own_is_compared_with_no_other() -> None:
    first = replace(SHAPE.layers[0], weight_bytes=SHAPE.layers[0].weight_bytes * 5)
    shape = replace(SHAPE, layers=(first, *SHAPE.layers[1:]))
    figures = figures_of(machine(), shape, WORKS, kind="stage")
    fitted = fit_machine(figures, shape, "--cloud", as_stage=True)
    assert fitted.resume_s == machine().resume_s


def test_too_few_figures_are_refused() -> None:
    figures = figures_of(machine(), SHAPE, WORKS[:4])
    with pytest.raises(FiguresError, match="fewer than two decode steps"):
        fit_machine(figures, SHAPE, "--local", as_stage=False)


def test_the_typical_time_is_not_moved_by_slow_ones() -> None:
    assert typical([1.0, 1.0, 1.1, 50.0, 90.0]) == 1.0


def test_the_typical_layers_are_those_of_a_step_and_not_the_quickest_of_each() -> None:
    assert typical_layers([[2.0, 1.0], [1.0, 2.0]] * 2) == [1.5, 1.5]
    assert typical_layers([[2.0, 1.0], [2.0, 1.0], [20.0, 1.0], [2.0, 10.0]]) == [2.0, 1.0]
    assert typical_layers([[0.0, 0.0]]) == [1e-9, 1e-9]


@pytest.mark.parametrize(
    ("text", "rtt_s", "bytes_s"),
    [("20ms,100Mbit", 0.02, 12.5e6), ("0.5 ms, 1Gbit/s", 5e-4, 125e6), ("1s,64kbit", 1, 8e3)],
)
def test_a_link_is_read_as_people_write_it(text: str, rtt_s: float, bytes_s: float) -> None:
    link = parse_link(text)
    assert link.rtt_s == pytest.approx(rtt_s)
    assert 1 / link.byte_s == pytest.approx(bytes_s)


@pytest.mark.parametrize("text", ["", "20ms", "100Mbit,20ms", "20ms,0Mbit", "-1ms,1Mbit", "a,b"])
def test_a_link_that_is_not_one_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="20ms,100Mbit"):
        parse_link(text)
