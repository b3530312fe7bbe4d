"""Out of memory: seen in torch's own error, and answered with less."""

import subprocess
import sys

import pytest
import torch

from mcp_vllm.split.memory import allocatable, is_out_of_memory

_LIMITED = """
import torch
from mcp_vllm.split.memory import allocatable
print(allocatable(4 << 30, torch.device("cpu")))
"""


def test_torch_says_it_in_a_runtime_error():
    with pytest.raises(RuntimeError) as failure:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(failure.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_what_is_there_is_given():
    assert allocatable(3 << 20, torch.device("cpu")) == 3 << 20


def test_a_process_with_a_limit_gets_less_by_fifths():
    limit = ["prlimit", f"--data={2 << 30}", "--"]
    ran = subprocess.run(
        [*limit, sys.executable, "-c", _LIMITED], capture_output=True, text=True, check=True
    )
    given = int(ran.stdout)
    assert 1 << 29 < given < 2 << 30
    share = 4 << 30
    while share > given:
        share = int(share * 0.8)
    assert share == given


def test_hardly_anything_is_an_error():
    with pytest.raises(MemoryError):
        allocatable(1000, torch.device("cpu"))
