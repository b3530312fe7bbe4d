"""Makes the virtual environment that `make` works in: exactly requirements/cpu.lock, and ourselves.

Run by `make install` with the machine's Python; standard library only. Every step may be repeated:
an install that was interrupted is finished by the next one.
"""

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

from pip_settings import uv_environment, uv_options

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run the steps one after the other; stop with one sentence at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--lock", type=Path, default=ROOT / "requirements" / "cpu.lock")
    parser.add_argument("--torch-index", required=True, help="asked for torch when pip's are not")
    args = parser.parse_args()

    pins = read_pins(args.lock)
    torch = [pin for pin in pins if pin.startswith("torch==")]
    uv_pin = next(pin for pin in pins if pin.startswith("uv=="))

    step(1, f"virtual environment {args.venv}")
    python = make_venv(args.venv)
    step(2, f"installer {uv_pin}")
    run(python, "-m", "pip", "install", "--no-deps", uv_pin)
    uv = Uv(python)
    step(3, " ".join(torch))
    install_torch(uv, torch, args.torch_index)
    step(4, f"{len(pins) - len(torch)} packages of {args.lock.name}")
    uv.install([pin for pin in pins if pin not in torch], *uv.options)
    step(5, "mcp-vllm itself")
    uv.install([], "--no-build-isolation", "--editable", str(ROOT))
    run(python, str(ROOT / "patches" / "vllm-metadata" / "generate.py"))
    step(6, "machine code of the codecs and of SmartCache")
    run(python, str(ROOT / "tools" / "compile_kernels.py"))


def read_pins(lock: Path) -> list[str]:
    """The lines of a lock that are neither empty nor comments."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def make_venv(folder: Path) -> str:
    """The interpreter of a usable environment in `folder`, made anew when there is none."""
    python = folder / "bin" / "python"
    if not _works(python):
        venv.create(folder, clear=True, with_pip=True)
    return str(python)


def _works(python: Path) -> bool:
    """Whether the environment has our own Python version and a pip (an old one may be broken)."""
    wanted = sys.version_info[:2]
    probe = f"import pip, sys; sys.exit(sys.version_info[:2] != {wanted})"
    try:
        return subprocess.run([python, "-c", probe], capture_output=True).returncode == 0
    except OSError:
        return False


class Uv:
    """uv, installing into the environment of one Python, with pip's certificates."""

    def __init__(self, python: str) -> None:
        self._command = [python, "-m", "uv", "pip", "install", "--no-deps", "--python", python]
        self._environ = {**uv_environment(python), **os.environ}
        self.options = uv_options(python)

    def finds(self, pins: list[str], *options: str) -> bool:
        """Whether an install of `pins` would succeed; nothing is installed."""
        dry = subprocess.run(
            [*self._command, "--dry-run", *options, *pins], env=self._environ, capture_output=True
        )
        return dry.returncode == 0

    def install(self, pins: list[str], *options: str) -> None:
        """Install `pins` and nothing else; uv shows its progress.

        Compiled at once: an engine imports thousands of modules, in several processes.
        """
        listed = ["--requirements", "-"] if pins else []
        run(
            *self._command,
            "--compile-bytecode",
            *options,
            *listed,
            environ=self._environ,
            text="\n".join(pins),
        )


def install_torch(uv: Uv, torch: list[str], torch_index: str) -> None:
    """Take torch where pip would find it, else from PyTorch's index; that one serves torch only."""
    if uv.finds(torch, *uv.options):
        uv.install(torch, *uv.options)
    else:
        print(f"    not where pip looks: trying {torch_index}", flush=True)
        uv.install(torch, "--default-index", torch_index)


def step(number: int, what: str) -> None:
    print(f"[{number}/6] {what}", flush=True)


def run(*command: str, environ: dict[str, str] | None = None, text: str = "") -> None:
    """Run a command whose output goes to the terminal; stop when it fails."""
    done = subprocess.run(command, env=environ, input=text, text=True)
    if done.returncode != 0:
        raise SystemExit(f"failed: {' '.join(command)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped: run make again to go on") from None
