"""Where a model's calibration is kept, so that it is found again without being named."""

from __future__ import annotations

from pathlib import Path

from mcp_vllm.cache_folder import cache_root
from mcp_vllm.codec.calibration import Calibration, calibration_file
from mcp_vllm.session.weights_identity import weights_identity


def calibration_path(model: Path) -> Path:
    """In the user's cache folder, by the content of the model's weights."""
    return calibration_file(cache_root(), weights_identity(model, cache_root()))


def find_calibration(model: Path) -> Calibration | None:
    """The model's calibration; None when none has been made."""
    path = calibration_path(model)
    return Calibration.load(path) if path.exists() else None
