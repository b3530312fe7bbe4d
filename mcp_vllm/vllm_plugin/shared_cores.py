"""OpenMP's waiting threads, where an engine and its stage share the cores of one machine.

After each parallel region libgomp's threads spin before they sleep, by default 300,000 turns: many
milliseconds, in which the other process wants the core for the layers that this one waits for.
Short spins bridge the gaps between a model's operations and leave the cores alone during the
other's turn. Read by libgomp when it is loaded: to be set before torch is imported, or for a child
process.
"""

from __future__ import annotations

from collections.abc import MutableMapping

# A user who has set one of these knows better.
_GIVEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SHARED = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


def share_cores(environ: MutableMapping[str, str]) -> None:
    """Let the OpenMP threads of processes with this environment soon sleep when they wait."""
    if not any(name in environ for name in _GIVEN):
        environ.update(SHARED)
