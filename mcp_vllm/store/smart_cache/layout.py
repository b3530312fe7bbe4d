"""What SmartCache keeps a block, as arrays that the compiled steps work on.

A *record* stands for a block that is held, or was (a ghost: what came of it still teaches). Records
are slots of one structured array, named by their number; -1 is none. Lists run through the records,
so a step allocates nothing. Owned by the `SmartCache` that made it; no locks.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

# Ages are counted in bins, two an octave: from a tenth of a second to a week, whatever the service.
BINS_PER_OCTAVE = 2
YOUNGEST_S = 0.1
NUM_BINS = math.ceil(math.log2(7 * 86400 / YOUNGEST_S) * BINS_PER_OCTAVE)
EDGES = np.concatenate(
    ([0.0], YOUNGEST_S * 2.0 ** (np.arange(NUM_BINS) / BINS_PER_OCTAVE))
)  # shape (NUM_BINS + 1,), seconds; bin b is EDGES[b] to EDGES[b + 1]

# What is known of a block at its last use, in levels; a combination is a *kind*. A block that ten
# requests had used before the last is no session's: of that, only the level of uses tells.
# Uses before this one: see `kinds.level_of_uses`. New blocks in the request, by octave from
# a sixteenth of a mean chain. Turn of the session. Tokens of the answer, by octave from 8; the last
# level is "not known". What ended the turn. Blocks from here to the end of the chain: 0, 1, 2-3,
# 4-7, 8-15, more.
LEVELS = {"uses": 6, "new": 8, "turn": 4, "output": 8, "ended": 3, "tail": 6}
FIRST_SHARED, NUM_NEW, NUM_TURNS, NUM_OUTPUTS, NUM_ENDS, NUM_TAILS = LEVELS.values()
NUM_USES = 14
NUM_OWN_KINDS = math.prod(LEVELS.values())
NUM_KINDS = NUM_OWN_KINDS + NUM_USES - FIRST_SHARED
# Each table tells kinds apart by the uses and a few of the others: see `kinds.py`.
TABLES = ("new, turn, last", "output, ended, last", "tail")
NUM_TABLES = len(TABLES)
CLASSES_PER_USE = 64
NUM_CLASSES = FIRST_SHARED * CLASSES_PER_USE

HELD, PROTECTED, COUNTED = 1, 2, 4

RECORD = np.dtype(
    [
        ("fingerprint", np.uint64),
        ("last_use_s", np.float64),
        ("saved_ms", np.float32),
        ("size_bytes", np.int32),
        ("parent", np.int32),  # held: the slot of its parent; ghost: the one of its kind before it
        ("leaf", np.int32),  # held: its place among the leaves; ghost: the ghost after it
        ("children", np.int32),  # those that are held
        ("older", np.int32),  # neighbours of the same age bin; a free slot: the next free one
        ("younger", np.int32),
        ("tenant_before", np.int32),  # neighbours among the tenant's leaves
        ("tenant_after", np.int32),
        ("kind", np.uint16),
        ("pins", np.uint16),
        ("tenant", np.uint16),
        ("uses", np.uint16),
        ("turn", np.uint8),
        ("bin", np.uint8),
        ("flags", np.uint8),
    ],
    align=True,
)

# Places in `State.numbers`.
(
    NUM_HELD,
    NUM_STAYING,  # ghosts, by kind: records.py
    NUM_PASSING,
    NUM_LEAVES,
    NUM_SLOTS_USED,
    FREE_SLOT,
    OLDEST_STAYING,
    NEWEST_STAYING,
    OLDEST_PASSING,
    NEWEST_PASSING,
    MAX_HELD,
    MAX_GHOSTS,
    BUDGET_BYTES,
    HELD_BYTES,
    NUM_ACCESSES,
    NEXT_REFRESH,
    RANDOM,
    EVICTIONS,
    NUM_REFRESHES,
    NUM_REQUESTS,
    NUM_NUMBERS,
) = range(21)
# Places in `State.seconds`; the score of the last block evicted is kept there too.
NOW, LAST_SCORE, NUM_SECONDS = range(3)

Function = TypeVar("Function", bound=Callable[..., Any])


class State(NamedTuple):
    """All of a SmartCache's numbers.

    Attributes:
        records: `RECORD`, shape (slots,).
        table: int32, shape (a power of two,): open addressing from fingerprint to slot.
        leaves: int32, shape (slots,): held, without a held child, not pinned.
        queues: int32, shape (2, NUM_BINS + 1): oldest and youngest record of each age bin.
        hazards: float64, shape (4, NUM_USES, NUM_BINS + 1): reuses seen, records that passed the
            bin, records in it now, and the estimate made of these.
        tables: float64, shape (4, NUM_TABLES, NUM_CLASSES, NUM_BINS + 1): the same three counts a
            class of each table, and the logarithm of its hazard over that of its uses alone.
        active: bool, shape (NUM_TABLES,): tables that are used; an ablation leaves some out.
        rates: float32, shape (NUM_KINDS, NUM_BINS + 1): reuses a second, see `hazard.py`.
        versions: int64, shape (NUM_KINDS,): which refresh a row of `rates` is of.
        tenants: int64, shape (4, tenants): held bytes, quota, first and last leaf.
        numbers, seconds: named by the constants above.
    """

    records: NDArray[Any]
    table: NDArray[np.int32]
    leaves: NDArray[np.int32]
    queues: NDArray[np.int32]
    hazards: NDArray[np.float64]
    tables: NDArray[np.float64]
    active: NDArray[np.bool_]
    rates: NDArray[np.float32]
    versions: NDArray[np.int64]
    tenants: NDArray[np.int64]
    numbers: NDArray[np.int64]
    seconds: NDArray[np.float64]


def _drop_stale_code() -> None:
    """A step that numba has cached does not notice that another file was edited, from which it has
    a constant or calls a step."""
    folder = Path(__file__).parent
    edited_ns = max(each.stat().st_mtime_ns for each in folder.glob("*.py"))
    for compiled in (folder / "__pycache__").glob("*.nb?"):
        with contextlib.suppress(OSError):  # another process does the same, or it is not ours
            if compiled.stat().st_mtime_ns < edited_ns:
                compiled.unlink()


_drop_stale_code()


def step(function: Function) -> Function:
    """Compile a step at its first call, or load it from numba's cache on disk."""
    try:
        compiled: Function = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # No folder to cache in is writable: compile for this process only.
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return compiled


def _sparse(shape: tuple[int, ...], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """Zeros that take memory where they are written to, by pages of 4 KiB: most kinds never come,
    and a huge page for one that does would be 200 bytes for each block of a small cache."""
    memory = mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def new_state(budget_bytes: int, max_held: int, max_ghosts: int, max_tenants: int) -> State:
    """An empty cache that has learned nothing. Memory is taken as records come, not here."""
    num_slots = max_held + max_ghosts
    table_size = 1 << max(4, (num_slots * 3 // 2 - 1).bit_length())
    numbers = np.zeros(NUM_NUMBERS, np.int64)
    numbers[[FREE_SLOT, OLDEST_STAYING, NEWEST_STAYING, OLDEST_PASSING, NEWEST_PASSING]] = -1
    numbers[MAX_HELD], numbers[MAX_GHOSTS] = max_held, max_ghosts  # of both kinds
    numbers[NUM_REFRESHES] = 1  # no row of rates is of it: zeros take no memory
    numbers[BUDGET_BYTES] = budget_bytes
    tenants = np.zeros((4, max_tenants), np.int64)
    tenants[1] = np.iinfo(np.int64).max
    tenants[2:] = -1
    return State(
        records=np.zeros(num_slots, RECORD),
        table=np.full(table_size, -1, np.int32),
        leaves=np.zeros(num_slots, np.int32),
        queues=np.full((2, NUM_BINS + 1), -1, np.int32),
        hazards=np.zeros((4, NUM_USES, NUM_BINS + 1)),
        tables=_sparse((4, NUM_TABLES, NUM_CLASSES, NUM_BINS + 1), np.float64),
        active=np.ones(NUM_TABLES, np.bool_),
        rates=_sparse((NUM_KINDS, NUM_BINS + 1), np.float32),
        versions=np.zeros(NUM_KINDS, np.int64),
        tenants=tenants,
        numbers=numbers,
        seconds=np.zeros(NUM_SECONDS),
    )
