"""From figures in files to a plan, a file for --mcp-split, a table, JSON and a picture."""

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from machines import WORKS, figures_of, machine
from rich.console import Console
from test_shape import LLAMA

from mcp_vllm import TaskPartitioner
from mcp_vllm.config.errors import ConfigError
from mcp_vllm.config.split import SplitConfig
from mcp_vllm.split.plan import report
from mcp_vllm.split.plan.cost import Load
from mcp_vllm.split.plan.figures import FiguresError, write_figures
from mcp_vllm.split.plan.fit import LinkFit
from mcp_vllm.split.plan.partitioner import Plan, PlanError
from mcp_vllm.split.plan.read import shape_of

LOAD = Load(prompt=100, answer=20, batch=2, budget=64)
QUICK = LinkFit(1e-4, 1e-9)
STAGE = "127.0.0.1:7090"


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """A model of six layers, a slow machine and a quick one."""
    config = changed(LLAMA, num_hidden_layers=6)
    config.save_pretrained(tmp_path / "model")
    shape = shape_of(config, "model", "float32")
    for name, speed in (("local", 0.01), ("cloud", 10.0)):
        write_figures(tmp_path / f"{name}.json", figures_of(machine(speed), shape, WORKS))
    return {name: str(tmp_path / f"{name}.json") for name in ("local", "cloud")}


def changed(config, **changes):
    return type(config)(**config.to_dict() | changes)


def plan_of(places: dict[str, str], link: LinkFit | None = QUICK, **settings) -> Plan:
    model = Path(places["local"]).parent / "model"
    settings = {"load": LOAD, "link": link, "dtype": "float32"} | settings
    return TaskPartitioner(str(model), places, **settings).plan()


def test_a_quick_cloud_takes_all_layers_that_may_go(places, tmp_path) -> None:
    plan = plan_of(places)
    assert plan.best is not None
    assert plan.best.split == (1, 5)
    plan.write_split_config(tmp_path / "split.yaml", [STAGE])
    written = SplitConfig.load(tmp_path / "split.yaml")
    assert (written.span, written.stages, written.form) == ((1, 5), (STAGE,), "raw")


def test_a_slow_link_does_not_pay_and_the_verdict_says_so(places) -> None:
    plan = plan_of(places, LinkFit(5.0, 1e-6))
    assert plan.best == plan.found.local
    assert "does not pay" in report.verdict(plan)


def test_a_machine_without_instructions_for_the_dtype_is_noted(places) -> None:
    assert plan_of(places).notes == ()
    slow = json.loads(Path(places["cloud"]).read_text()) | {"dtypes": ["bfloat16"]}
    Path(places["cloud"]).write_text(json.dumps(slow))
    (note,) = plan_of(places).notes
    assert note.startswith("--cloud: made-up does not compute in float32, only in bfloat16")


def test_the_form_is_as_exact_as_the_link_allows(places) -> None:
    assert plan_of(places, form="auto").form == "raw"
    slow = plan_of(places, LinkFit(1e-6, 1e-2), form="auto")
    assert slow.form == "fp8"
    assert (
        slow.found.best_split.request_s
        < 0.5 * plan_of(places, LinkFit(1e-6, 1e-2)).found.best_split.request_s
    )
    assert slow.split_config([STAGE]).form == "fp8"


def test_of_the_exact_forms_the_quickest_is_taken(places) -> None:
    taken = set()
    for byte_s in (1e-9, 1e-8, 3e-8, 1e-7, 1e-6):
        link = LinkFit(1e-6, byte_s)
        plan, raw, packed = (plan_of(places, link, form=f) for f in ("auto", "raw", "packed"))
        taken.add(plan.form)
        if plan.form in ("raw", "packed"):
            quicker = min(raw.found.best_split.request_s, packed.found.best_split.request_s)
            assert plan.found.best_split.request_s == quicker
    assert {"raw", "packed"} <= taken


def test_less_cloud_is_less_memory_at_the_stage(places) -> None:
    plan = plan_of(places)
    less = plan.reduce_cloud_load()
    assert plan.best is not None
    assert less.best is not None
    assert less.best.stage_bytes <= 0.8 * plan.best.stage_bytes


def test_memory_given_by_flag_goes_before_that_of_the_figures(places) -> None:
    plan = plan_of(places, local_bytes=1000)
    assert plan.best is None
    assert "Nothing fits" in report.verdict(plan)
    with pytest.raises(PlanError, match="no split fits"):
        plan.split_config([STAGE])


def test_the_table_marks_the_best_and_shows_both_extremes(places) -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table(plan_of(places), 3))
    lines = console.export_text().splitlines()
    assert any("nothing" in each for each in lines)
    assert [each for each in lines if "best" in each]
    assert all("1:5" in each for each in lines if "best" in each)


def test_json_has_every_split_and_is_json(places) -> None:
    made = json.loads(json.dumps(report.as_json(plan_of(places))))
    assert len(made["splits"]) == 4 + 3 + 2 + 1
    assert made["best"]["split"] == "1:5"
    assert made["everything_local"]["split"] is None


def test_the_picture_is_drawn(places, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    report.picture(plan_of(places), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PlanError, match="--picture"):
        report.picture(plan_of(places), tmp_path / "none" / "plan.png")


def test_a_far_stage_needs_tls_in_the_written_file_too(places) -> None:
    plan = plan_of(places)
    with pytest.raises(ConfigError, match="tls"):
        plan.split_config(["10.0.0.1:7090"])
    assert plan.split_config(["10.0.0.1:7090"], insecure=True).stages == ("10.0.0.1:7090",)


def test_figures_without_a_link_are_not_enough(places) -> None:
    with pytest.raises(PlanError, match="--link"):
        plan_of(places, link=None)


def test_no_stage_is_named_no_file_is_written(places, tmp_path) -> None:
    with pytest.raises(PlanError, match="--stage"):
        plan_of(places).write_split_config(tmp_path / "split.yaml")


def test_both_places_are_needed() -> None:
    with pytest.raises(PlanError, match="cloud"):
        TaskPartitioner("model", {"local": "cpu"})


def test_figures_of_another_dtype_are_refused(places) -> None:
    with pytest.raises(FiguresError, match="bfloat16"):
        plan_of(places, dtype="bfloat16")


def test_a_plan_is_not_changed_by_another_one(places) -> None:
    plan = plan_of(places)
    again = dataclasses.replace(plan)
    plan.reduce_cloud_load(0.5)
    assert plan.found == again.found
