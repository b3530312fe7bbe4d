"""The arrow of imports goes down only: read from the source, nothing is imported."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "mcp_vllm"
PURE = {"codec", "session", "store", "security", "config"}
# Rooms that a program without torch may import: it is loaded when a function needs it.
LAZY = PURE | {"hf"}
HEAVY = {"torch", "transformers"}
VLLM_ROOMS = ("vllm_plugin/", "split/engine/")
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc"}


@dataclass(frozen=True)
class Import:
    """One imported module, and whether it is imported when the importing module is.

    Not what a function imports, nor what only a type checker reads.
    """

    module: str
    at_load: bool


def imports_of(path: Path, package: Path) -> Iterator[Import]:
    """Every import statement of a file, relative ones resolved, those inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    unread = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    ]
    deferred = {id(inner) for outer in (*functions, *unread) for inner in ast.walk(outer)}
    here = (package.name, *path.relative_to(package).parent.parts)
    for node in ast.walk(tree):
        at_load = id(node) not in deferred
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            yield from (Import(f"{module}.{alias.name}", at_load) for alias in node.names)


def faults(package: Path) -> list[str]:
    """Every broken rule of the layout, as `file: what it must not do`."""
    found: list[str] = []
    needs: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        room = name.partition("/")[0]
        if path.stem in NAMES_THAT_SAY_NOTHING or path.parent.name in NAMES_THAT_SAY_NOTHING:
            found.append(f"{name}: its name does not say what it is for")
        for each in imports_of(path, package):
            top, *rest = each.module.split(".")
            if top == "vllm" and not name.startswith(VLLM_ROOMS):
                found.append(f"{name}: imports vllm")
            if room in PURE and top == "aiohttp":
                found.append(f"{name}: imports {top}")
            if room in LAZY and top in HEAVY and each.at_load:
                found.append(f"{name}: imports {top}")
            if top == package.name and rest and (package / rest[0]).is_dir() and "/" in name:
                needs.setdefault(room, set()).add(rest[0])
    for room, others in needs.items():
        others.discard(room)
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        found.append(f"cycle: {' -> '.join(error.args[1])}")
    return found


def test_the_package_keeps_to_its_layers() -> None:
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ({"codec/a.py": "def f():\n    import vllm.config"}, "codec/a.py: imports vllm"),
        ({"agent/a.py": "from vllm import LLM"}, "agent/a.py: imports vllm"),
        ({"split/a.py": "import vllm"}, "split/a.py: imports vllm"),
        ({"store/a.py": "import aiohttp.web"}, "store/a.py: imports aiohttp"),
        ({"codec/a.py": "if True:\n    import torch"}, "codec/a.py: imports torch"),
        ({"hf/a.py": "from transformers import Cache"}, "hf/a.py: imports transformers"),
        ({"codec/utils.py": ""}, "codec/utils.py: its name does not say what it is for"),
        (
            {"a/x.py": "from mcp_vllm.b import y", "b/y.py": "from .. import a"},
            "cycle: ",
        ),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, sources: dict[str, str], fault: str) -> None:
    package = tmp_path / "mcp_vllm"
    for name, text in sources.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    (found,) = faults(package)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    "sources",
    [
        {"vllm_plugin/a.py": "import vllm", "split/engine/a.py": "import vllm"},
        {"codec/a.py": "def f():\n    import torch"},
        {"hf/a.py": "if TYPE_CHECKING:\n    from transformers import Cache"},
        {
            "agent/a.py": "import aiohttp\nfrom mcp_vllm.codec import b",
            "codec/b.py": "import mcp_vllm",
        },
        {"codec/a.py": "from mcp_vllm import errors", "errors.py": ""},
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path: Path, sources: dict[str, str]) -> None:
    package = tmp_path / "mcp_vllm"
    for name, text in sources.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert faults(package) == []


def test_what_an_engine_loads_before_its_worker_does_not_load_numba():
    """vLLM's CPU worker looks through all modules, and stumbles over llvmlite's library."""
    modules = "mcp_vllm.codec, mcp_vllm.split.activations, mcp_vllm.vllm_plugin"
    program = f"import sys, {modules}; print(sorted({{'numba', 'llvmlite'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert found.stdout == b"[]\n"
