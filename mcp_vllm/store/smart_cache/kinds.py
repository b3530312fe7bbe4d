"""Kinds of blocks: the levels of what is known of a block, packed into one number.

A table of `hazard.py` puts kinds that agree in some levels into one class; all tables agree in the
uses, the level that tells most. Of a block that many requests share, the uses are all there is, and
no table has it: what the last of them was like says nothing of the next.
"""

from __future__ import annotations

import math

from mcp_vllm.store.smart_cache.layout import (
    CLASSES_PER_USE,
    FIRST_SHARED,
    NUM_ENDS,
    NUM_NEW,
    NUM_OUTPUTS,
    NUM_OWN_KINDS,
    NUM_TAILS,
    NUM_TURNS,
    NUM_USES,
    step,
)

OUTPUT_NOT_KNOWN = NUM_OUTPUTS - 1


@step
def pack(uses: int, new: int, turn: int, output: int, ended: int, tail: int) -> int:
    """The kind of these levels."""
    if uses >= FIRST_SHARED:
        return NUM_OWN_KINDS + uses - FIRST_SHARED
    kind = (uses * NUM_NEW + new) * NUM_TURNS + turn
    return ((kind * NUM_OUTPUTS + output) * NUM_ENDS + ended) * NUM_TAILS + tail


@step
def is_shared(kind: int) -> bool:
    """Whether so many requests use such a block that it is no session's."""
    return kind >= NUM_OWN_KINDS


@step
def uses_of(kind: int) -> int:
    """The level of uses of a kind."""
    if is_shared(kind):
        return kind - NUM_OWN_KINDS + FIRST_SHARED
    return kind // (NUM_NEW * NUM_TURNS * NUM_OUTPUTS * NUM_ENDS * NUM_TAILS)


@step
def class_of(kind: int, table: int) -> int:
    """The class of a kind that is not shared in a table: uses, then what the table looks at."""
    tail = kind % NUM_TAILS
    kind //= NUM_TAILS
    ended = kind % NUM_ENDS
    kind //= NUM_ENDS
    output = kind % NUM_OUTPUTS
    kind //= NUM_OUTPUTS
    turn = kind % NUM_TURNS
    kind //= NUM_TURNS
    new = kind % NUM_NEW
    start = kind // NUM_NEW * CLASSES_PER_USE
    last = 1 if tail == 0 else 0
    if table == 0:
        return start + (new * NUM_TURNS + turn) * 2 + last
    if table == 1:
        return start + (output * NUM_ENDS + ended) * 2 + last
    return start + tail


@step
def level_of_uses(uses: int) -> int:
    """0, 1, 2, 3, 4-5, 6-9, 10-17, 18-33, 34-65 and so on, more than 1,025."""
    if uses < 4:
        return uses
    return min(int(math.log2(uses - 2)) + 3, NUM_USES - 1)


@step
def octave(value: float, lowest: float, most: int) -> int:
    """0 below `lowest`, then one level an octave, at most `most`."""
    if value < lowest:
        return 0
    return min(int(math.log2(value / lowest)) + 1, most)
