"""The KV blocks of one client's lease: which are free, and a session's block table.

Block 0 is vLLM's null block and never given. All groups share one pool: a block belongs to one
group of one session at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from mcp_vllm.split.errors import WireError
from mcp_vllm.split.wire import KvPlan


class BlockPool:
    """Attributes:
    block_tokens: tokens a block, by group.
    """

    def __init__(self, plan: KvPlan) -> None:
        """Raises WireError: no stage plans like that."""
        if plan.num_blocks < 2 or not plan.block_tokens or min(plan.block_tokens) < 1:
            raise WireError(f"a plan of {plan.num_blocks} blocks for groups {plan.block_tokens}")
        self.block_tokens = tuple(plan.block_tokens)
        self.num_blocks = plan.num_blocks - 1
        self._free: deque[int] = deque(range(1, plan.num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def empty_table(self) -> list[list[int]]:
        return [[] for _ in self.block_tokens]

    def missing(self, table: Sequence[Sequence[int]], num_tokens: int) -> int:
        """How many blocks `table` lacks to hold so many tokens."""
        return sum(self._lacks(table, num_tokens))

    def extend(self, table: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Let `table` hold so many tokens; the new ids, by group. `missing` must be free."""
        lacks = self._lacks(table, num_tokens)
        added = [[self._free.popleft() for _ in range(count)] for count in lacks]
        for group, ids in zip(table, added, strict=True):
            group.extend(ids)
        return added

    def release(self, table: list[list[int]]) -> None:
        """Take all blocks of `table` back."""
        for group in table:
            self._free.extend(group)
            group.clear()

    def _lacks(self, table: Sequence[Sequence[int]], num_tokens: int) -> list[int]:
        return [
            max(0, -(-num_tokens // size) - len(ids))
            for ids, size in zip(table, self.block_tokens, strict=True)
        ]
