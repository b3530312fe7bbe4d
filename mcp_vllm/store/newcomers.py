"""Chunks that came and whose request has not said yet what chain they are of.

Until it does, the policy knows nothing of them that it could judge by, and the chunks of one
request would push each other out. So they are pinned, as far as they take no more than a share of
the store: of more, the first to come are judged as they are. Kept by `RamStore`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mcp_vllm.store.chunk_policy import ChunkPolicy

if TYPE_CHECKING:
    from mcp_vllm.store.ram import ChunkKey

MAX_SHARE = 0.25


class Newcomers:
    """See the module's docstring."""

    def __init__(self, policy: ChunkPolicy) -> None:
        self._policy = policy
        self._sizes: dict[ChunkKey, int] = {}
        self._bytes = 0

    def add(self, name: ChunkKey, held_bytes: int) -> None:
        """The policy holds it since just now."""
        self._policy.pin([name])
        self._sizes[name] = held_bytes
        self._bytes += held_bytes
        while self._bytes > MAX_SHARE * self._policy.budget_bytes:
            self._judge([next(iter(self._sizes))])

    def settle(self, names: Iterable[ChunkKey]) -> None:
        """Those of them that are newcomers are none any more."""
        known = [name for name in names if self.forget(name)]
        self._policy.unpin(known)

    def settle_all(self) -> bool:
        """None is a newcomer any more; whether there was one."""
        had_any = bool(self._sizes)
        self._judge(list(self._sizes))
        return had_any

    def _judge(self, names: list[ChunkKey]) -> None:
        """Their request has not said a word, and they are judged all the same."""
        for name in names:
            self._policy.begin_to_age(name)
        self.settle(names)

    def forget(self, name: ChunkKey) -> bool:
        """It has left, and its pin with it; whether it was a newcomer."""
        held_bytes = self._sizes.pop(name, None)
        self._bytes -= held_bytes or 0
        return held_bytes is not None
