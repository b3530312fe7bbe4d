"""The command: what is wrong is said with its flag, and a plan from files needs no engine."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from machines import WORKS, figures_of, machine
from test_shape import LLAMA
from typer.testing import CliRunner

from mcp_vllm.cli.main import app
from mcp_vllm.split.plan.figures import write_figures
from mcp_vllm.split.plan.read import shape_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LLAMA.save_pretrained(tmp_path / "model")
    shape = shape_of(LLAMA, "model", "bfloat16")
    write_figures(tmp_path / "here.json", figures_of(machine(0.01), shape, WORKS))
    write_figures(tmp_path / "there.json", figures_of(machine(10), shape, WORKS))
    return tmp_path


def run(folder: Path, *more: str, cloud: str = "there.json", link: str = "1ms,1Gbit"):
    places = ("--local", str(folder / "here.json"), "--cloud", cloud)
    given = ("plan", str(folder / "model"), *places, "--dtype", "bfloat16", *more)
    return CliRunner().invoke(app, [*given, *(("--link", link) if link else ())])


def test_a_plan_from_files_prints_a_table_and_writes_the_split(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    result = run(folder, "--write", "split.yaml", "--stage", "127.0.0.1:7090")
    assert result.exit_code == 0, result.output
    assert "nothing" in result.stdout
    assert "Best: layers 1:2 at the stage" in result.stdout
    assert "layers: '1:2'" in Path("split.yaml").read_text()


def test_json_is_the_only_thing_on_standard_output(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    result = run(folder, "--json")
    assert json.loads(result.stdout)["best"]["split"] == "1:2"


def test_a_step_limit_gives_a_token_budget(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    result = run(folder, "--max-step-ms", "60000")
    assert "--max-num-batched-tokens 512" in result.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cloud": "nothing"}, "--cloud"),
        ({"link": "fast"}, "--link"),
        ({"more": ("--form", "int8")}, "--form"),
        ({"more": ("--local-memory", "much")}, "--local-memory"),
        ({"more": ("--security", '{"stages": []}')}, "--security"),
        ({"more": ("--measure",)}, "--output"),
        ({"link": ""}, "--link"),
    ],
)
def test_what_is_wrong_is_said_with_its_flag(folder, monkeypatch, given, said) -> None:
    monkeypatch.chdir(folder)
    more = given.pop("more", ())
    result = run(folder, *more, **given)
    assert result.exit_code == 1
    assert said in result.output
    assert "Traceback" not in result.output
