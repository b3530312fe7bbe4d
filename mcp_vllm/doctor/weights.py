"""The model's identity: what decides whether two engines may exchange blocks, and what it costs.

The engine computes the same at its start and finds it in the same cache, so a model that was
examined here starts without reading its weights twice.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from mcp_vllm.cache_folder import cache_root
from mcp_vllm.doctor.check import Check, fail, ok, warn
from mcp_vllm.errors import McpError
from mcp_vllm.session.weights_identity import weights_identity

DEADLINE_S = 300.0


def check_weights(
    model: Path, cache_dir: Path | None = None, deadline_s: float = DEADLINE_S
) -> Check:
    """Hash the weights, or find them in the cache."""
    name = "model weights"
    if not model.exists():
        return fail(name, f"{model} is not here", "give the local folder (or file) of the model")
    outcome: list[Check] = []
    started_s = time.monotonic()

    def identify() -> None:
        try:
            identity = weights_identity(model, cache_dir or cache_root())
        except (McpError, OSError) as error:
            outcome.append(fail(name, str(error), "engines of this model share with nobody"))
            return
        elapsed_s = time.monotonic() - started_s
        outcome.append(ok(name, f"{identity[:16]} of {model} in {elapsed_s:.1f} s"))

    thread = threading.Thread(target=identify, daemon=True)
    thread.start()
    thread.join(deadline_s)
    return next(
        iter(outcome),
        warn(
            name,
            f"hashing {model} takes more than {deadline_s:.0f} s",
            "the engine serves without its agent for as long; faster storage helps, and it is "
            "done once for unchanged files",
        ),
    )
