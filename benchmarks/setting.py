"""What stands beside every figure: the machine, the versions, the date."""

import datetime
import os
import platform
from importlib import metadata


def describe() -> dict[str, str]:
    """The machine and the versions as short texts."""
    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "accelerator": "none (not run on a GPU)",
        "python": platform.python_version(),
        "vllm": metadata.version("vllm"),
        "mcp-vllm": metadata.version("mcp-vllm"),
        "date": datetime.date.today().isoformat(),
    }


def one_line() -> str:
    """The same on one line."""
    return ", ".join(f"{name} {value}" for name, value in describe().items())


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
