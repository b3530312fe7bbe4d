"""Where torch is not installed, the tests of what works on tensors are left out, and said to be."""

import importlib.util

NEED_TORCH = ["hf/test_hf_cache.py", "session/test_delta.py"]
NEED_TORCH += ["split/test_activations.py", "split/test_memory.py"]

collect_ignore = [] if importlib.util.find_spec("torch") else NEED_TORCH


def pytest_report_header() -> str:
    return f"left out without torch: {', '.join(collect_ignore)}" if collect_ignore else ""
