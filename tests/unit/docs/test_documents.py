"""The documents name only what exists: targets, commands, flags, files, links and metrics."""

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from prometheus_client.metrics import MetricWrapperBase

from mcp_vllm.cli.main import COMMANDS
from mcp_vllm.telemetry.agent_metrics import AgentMetrics
from mcp_vllm.telemetry.stage_metrics import StageMetrics

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("patches/*.md")])
PLUGIN = ROOT / "mcp_vllm" / "vllm_plugin"
# vLLM's own, used in our snippets.
VLLM_FLAGS = {"--kv-transfer-config", "--prefix-caching-hash-algo", "--enforce-eager"}
VENV_PYTHON = ".venv/bin/python"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATHS = (
    "mcp_vllm/",
    "tests/",
    "benchmarks/",
    "configs/",
    "docs/",
    "examples/",
    "patches/",
    "requirements/",
    "tools/",
)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def commands_of(text: str) -> Iterator[list[str]]:
    """Shell commands of the text's `sh` blocks and inline code, as words; other code is skipped."""
    lines = [
        line for kind, body in BLOCK.findall(text) if kind == "sh" for line in body.splitlines()
    ]
    lines += INLINE.findall(BLOCK.sub("", text))
    for line in lines:
        for part in re.split(r"&&|;|&$", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:
                continue
            if words and words[0] in ("make", "mcp-vllm", "vllm", VENV_PYTHON):
                yield words


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))


def plugin_flags() -> set[str]:
    """The flags of `vllm serve` that the plugin adds, read from its source: it needs vLLM."""
    calls = (node for node in ast.walk(ast.parse(read(PLUGIN / "flags.py"))))
    return {
        node.args[0].value
        for node in calls
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
        and isinstance(node.args[0], ast.Constant)
    }


def faults_of(words: list[str]) -> list[str]:
    """What of this command does not exist."""
    program, *rest = words
    if program == "make":
        return [word for word in rest if "=" not in word and word not in make_targets()]
    if program == VENV_PYTHON:
        return [word for word in rest if word.startswith(PATHS) and not (ROOT / word).exists()]
    if program == "mcp-vllm" and "--" in rest:
        rest = rest[: rest.index("--")]  # what follows is for vLLM
    flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
    if program == "vllm":
        return [flag for flag in flags if flag not in plugin_flags() | VLLM_FLAGS]
    if not rest or rest[0] in ("--help", "--version"):
        return []
    name, *rest = rest
    if name not in COMMANDS:
        return [name]
    command = typer.main.get_command(importlib.import_module(COMMANDS[name].module).app)
    if hasattr(command, "commands"):
        while rest and rest[0].startswith("-"):
            if rest[0] not in options_of(command):
                return [f"{name} {rest[0]}"]
            flags.remove(rest[0])
            rest = rest[2:]
        if not rest:
            return []
        if rest[0] not in command.commands:
            return [f"{name} {rest[0]}"]
        command = command.commands[rest[0]]
    return [flag for flag in flags if flag not in options_of(command)]


def options_of(command: Any) -> set[str]:
    """Its flags, in all their spellings."""
    named = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    return named | {"--help"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_a_document_exist_with_their_flags(path: Path) -> None:
    assert [(words, bad) for words in commands_of(read(path)) if (bad := faults_of(words))] == []


@pytest.mark.parametrize(
    "command",
    [
        "make demos",
        "mcp-vllm docter",
        "mcp-vllm config chek FILE",
        "mcp-vllm agent --conf x",
        "vllm serve MODEL --mcp-peers h:1",
        ".venv/bin/python benchmarks/nosuch.py",
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    (words,) = commands_of(f"```sh\n{command}\n```")
    assert faults_of(words)


def test_the_readme_starts_with_what_mcp_means_and_the_two_targets() -> None:
    first_screen = read(ROOT / "README.md").splitlines()[:24]
    text = " ".join(first_screen)
    assert "not the tool-calling protocol" in text.replace("**", "")
    assert any(line.startswith("make demo") for line in first_screen)
    assert any(line.startswith("make test") for line in first_screen)


def anchors_of(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", read(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_a_document_lead_somewhere(path: Path) -> None:
    broken = []
    for target in LINK.findall(BLOCK.sub("", read(path))):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        if not linked.exists() or (anchor and anchor not in anchors_of(linked)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(path: Path) -> None:
    # Rooms that the layout foresees may be named before they are built.
    foreseen = {"mcp_vllm/split/engine"}
    named = {name for name in INLINE.findall(read(path)) if name.startswith(PATHS)}
    assert [name for name in named - foreseen if not (ROOT / name).exists()] == []


def test_python_in_the_readme_is_python() -> None:
    for kind, body in BLOCK.findall(read(ROOT / "README.md")):
        if kind == "python":
            ast.parse(body)


def documented_metrics() -> dict[str, tuple[str, str]]:
    """Name -> kind and labels, from the tables of the operations page."""
    row = re.compile(r"^\| `((?:vllm:)?mcp_\w+)` \| (\w+) \| ([^|]*) \|", re.MULTILINE)
    return {
        name: (kind, labels.replace("`", "").strip())
        for name, kind, labels in row.findall(read(ROOT / "docs" / "operations.md"))
    }


def agent_metrics() -> dict[str, tuple[str, str]]:
    """Those of agents and of stages."""
    declared = [*vars(AgentMetrics()).values(), *vars(StageMetrics()).values()]
    metrics = [each for each in declared if isinstance(each, MetricWrapperBase)]
    return {
        each._name + ("_total" if each._type == "counter" else ""): (
            each._type,
            ", ".join(each._labelnames),
        )
        for each in metrics
    }


def engine_metrics() -> dict[str, tuple[str, str]]:
    """Read from the source, which imports vLLM."""
    tree = ast.parse(read(PLUGIN / "metrics.py"))
    (names,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    values = {
        each.targets[0].id: ast.literal_eval(each.value)
        for each in names.body
        if isinstance(each, ast.Assign)
    }
    (table,) = (node for node in ast.walk(tree) if isinstance(node, ast.Dict))
    found = {}
    for key, call in zip(table.keys, table.values, strict=True):
        kind = call.func.id
        labels = ast.literal_eval(call.args[1]) if len(call.args) > 1 else ()
        name = values.pop(key.attr) + ("_total" if kind == "counter" else "")
        found[name] = (kind, ", ".join(labels))
    assert not values, "a metric without a definition"
    return found


def test_the_operations_page_lists_every_metric_and_no_other() -> None:
    assert documented_metrics() == engine_metrics() | agent_metrics()


def test_metrics_and_response_keys_that_the_documents_mention_exist() -> None:
    known = set(engine_metrics() | agent_metrics())
    text = "\n".join(read(path) for path in DOCUMENTS)
    mentioned = set(re.findall(r"`((?:vllm:)?mcp_(?!vllm)[a-z_]+)[`{ ]", text))
    assert mentioned - known - {"mcp_agent_"} == set()
    connector = read(PLUGIN / "connector.py")
    table = re.search(r"\| Key \| Meaning \|\n.*?\n\n", read(ROOT / "README.md"), re.DOTALL)
    assert table
    keys = set(re.findall(r"`([a-z_]+)`(?=,| \|)", table[0]))
    assert keys == set(re.findall(r'^            "([a-z_]+)":', connector, re.MULTILINE))


def test_the_readme_names_only_the_terms_that_come_with_the_weights() -> None:
    fetch = read(ROOT / "mcp_vllm" / "demo" / "fetch_gemma.py")
    for name in ("NOTICE.md", "GEMMA_TERMS.html"):
        assert f'"{name}"' in fetch
        assert f"`{name}`" in read(ROOT / "README.md")


def test_inline_json_in_the_documents_is_json() -> None:
    for path in DOCUMENTS:
        for kind, body in BLOCK.findall(read(path)):
            if kind == "json":
                json.loads(body)
