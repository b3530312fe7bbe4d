"""Resolves requirements/cpu.in and pyproject.toml into requirements/cpu.lock (`make lock`).

Pins that are in the lock already and still fit are kept, so that a new dependency moves no other.
Delete the lock first to move everything to the newest release.
"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from pip_settings import uv_options

REQUIREMENTS = Path("requirements")
LOCK = REQUIREMENTS / "cpu.lock"
OLDEST_PYTHON = "3.11"
HEAD = """\
# Written by `make lock`: do not edit. Every package of the CPU install, for Python 3.11 to 3.13.
#
# Resolved from cpu.in and from pyproject.toml with its extras `demo` and `dev`, without what
# cpu.exclude lists; cpu.torch is added as it is. Regenerate with `make lock`, which keeps the pins
# that still fit, or delete this file before to take the newest of everything.
# Installed with --no-deps: no resolver decides, so an install in a year is the same as today.
"""


def main() -> None:
    resolved = subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile"),
            *("pyproject.toml", str(REQUIREMENTS / "cpu.in"), "--extra", "demo", "--extra", "dev"),
            *("--excludes", str(REQUIREMENTS / "cpu.exclude")),
            *("--universal", "--python-version", OLDEST_PYTHON),
            *("--no-annotate", "--no-header", "--quiet", "--output-file", str(LOCK)),
            *uv_options(sys.executable),
        ],
        check=False,
    )
    if resolved.returncode != 0:
        raise SystemExit(f"{LOCK} was not changed: the resolver found no solution (see above)")
    pins = _pins(REQUIREMENTS / "cpu.torch") + _pins(LOCK)
    LOCK.write_text(HEAD + "\n".join(sorted(pins, key=_name)) + "\n", encoding="utf-8")
    print(f"{LOCK}: {len(pins)} packages")


def _pins(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", " "))]


def _name(pin: str) -> str:
    return pin.partition("==")[0]


if __name__ == "__main__":
    main()
