"""Benchmarks are run by hand and seldom: what they import from beside themselves must be there."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The folders that a benchmark puts on its path, or imports `tests.` and `mcp_vllm.` from.
FOLDERS = (ROOT / "benchmarks", ROOT / "tests", ROOT)
# Installed for benchmarks only (extra `bench`).
OPTIONAL = {"blosc2", "diskcache", "lightgbm", "lmdb", "lz4", "matplotlib", "pcodec", "rocksdict"}
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


def module_file(name: str) -> Path | None:
    """The project's file of that module, if it is one of the project's."""
    for folder in FOLDERS:
        path = folder.joinpath(*name.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return file
    return None


def names_in(file: Path) -> set[str]:
    """What the module defines or imports, or, if only when it is asked for, mentions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Constant(value=str()):
                names.add(node.value)
            case ast.Import() | ast.ImportFrom():
                names |= {(each.asname or each.name).split(".")[0] for each in node.names}
    return names


def imports_of(file: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, each.name) for each in node.names)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda each: each.stem)
def test_what_a_benchmark_imports_is_there(benchmark: Path) -> None:
    for module, name in imports_of(benchmark):
        file = module_file(module)
        if file is None:
            top = module.split(".")[0]
            is_installed = top in OPTIONAL or importlib.util.find_spec(top) is not None
            is_known = is_installed and top not in ("mcp_vllm", "tests")
            assert is_known, f"{benchmark.name} imports {module}: there is none"
        else:
            is_there = name in names_in(file) or module_file(f"{module}.{name}") is not None
            assert is_there, f"{benchmark.name} imports {name} from {module}: it has none"
