"""OpenMP's waiting threads, where an engine and its stage share the cores of one machine.

After each parallel region libgomp's threads spin before they sleep, by default 300,000 turns of 22
(AMD Zen 5) to 47 nanoseconds (Intel): 7 milliseconds and more, in which the other process wants the
core for the layers that this one waits for. Too short spins cost more: between two operations of a
model lie tens to hundreds of microseconds, and a thread that sleeps by then has to be woken for
each. What a split of Gemma-3-270m with six layers at a stage on loopback costs a step, Zen 5, means
of two to six starts in turn: 4.1 ms with 3,000 turns, 2.6 with 30,000, 2.2 with 60,000, 1.9 with
100,000; Intel: slower with 10,000 than with 30,000, the same with 60,000. Read by libgomp when it
is loaded: to be set before torch is imported, or for a child process.
"""

from __future__ import annotations

from collections.abc import MutableMapping

# A user who has set one of these knows better.
_GIVEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SHARED = {"GOMP_SPINCOUNT": "60000", "KMP_BLOCKTIME": "1"}


def share_cores(environ: MutableMapping[str, str]) -> None:
    """Let the OpenMP threads of processes with this environment soon sleep when they wait."""
    if not any(name in environ for name in _GIVEN):
        environ.update(SHARED)
