"""Engines of the demo compute in what the processor has instructions for."""

import platform

import llvmlite.binding
import pytest

from mcp_vllm.demo import engines


@pytest.mark.parametrize(
    ("machine", "features", "is_cpu", "expected"),
    [
        ("x86_64", {"avx2": True, "avx512bw": False}, True, ("--dtype", "float32")),
        ("x86_64", {"avx2": True}, True, ("--dtype", "float32")),
        ("x86_64", {"avx2": True, "avx512bw": False}, False, ()),
        ("x86_64", {"avx2": True, "avx512bw": True}, True, ()),
        ("aarch64", {"bf16": True}, True, ()),
    ],
)
def test_float32_where_products_in_bfloat16_would_be_converted(
    monkeypatch, machine, features, is_cpu, expected
) -> None:
    monkeypatch.setattr(engines, "is_cpu_build", lambda: is_cpu)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: features)
    assert engines.quick_dtype_args() == expected
