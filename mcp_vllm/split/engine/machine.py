"""What this machine is, as plans need it: its name, its memory, what it computes in."""

from __future__ import annotations

import os
from typing import Any

import psutil
import torch
from vllm.platforms import current_platform


def free_bytes() -> int:
    """Memory where weights and KV would go."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def machine_name() -> str:
    """Of the device; no host name, which is nobody's business."""
    return f"{current_platform.get_device_name() or 'cpu'}, {os.cpu_count()} cores"[:200]


def native_dtypes(device: torch.device) -> list[Any]:
    """What the device multiplies in without converting first, widest first."""
    if device.type == "cpu":
        flags = torch.backends.cpu.get_cpu_capability()
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        has_fp16 = torch.ops.mkldnn._is_mkldnn_fp16_supported() and flags != "DEFAULT"
    else:
        has_fp16 = True
        has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return ["float32", *["bfloat16"] * has_bf16, *["float16"] * has_fp16]
