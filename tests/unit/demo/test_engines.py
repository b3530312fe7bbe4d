"""Engines of the demo compute in what the processor has instructions for."""

import pytest

from mcp_vllm.demo import engines


@pytest.mark.parametrize(
    ("cpuinfo", "is_cpu", "expected"),
    [
        ("processor: 0\nflags\t\t: fpu avx2 fma\n", True, ("--dtype", "float32")),
        ("processor: 0\nflags\t\t: fpu avx2 fma\n", False, ()),
        ("flags : avx2 avx512f avx512bw avx512vl\n", True, ()),
        ("Features : fp asimd bf16\n", True, ()),
    ],
)
def test_float32_where_products_in_bfloat16_would_be_converted(
    tmp_path, monkeypatch, cpuinfo, is_cpu, expected
) -> None:
    monkeypatch.setattr(engines, "is_cpu_build", lambda: is_cpu)
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert engines.quick_dtype_args(path) == expected


def test_systems_without_such_a_file_keep_the_model_s_dtype(tmp_path) -> None:
    assert engines.quick_dtype_args(tmp_path / "none") == ()
