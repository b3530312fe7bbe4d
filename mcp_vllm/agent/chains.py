"""Chunks in their chains: whose follow each other, and what each saves when it is not computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mcp_vllm.link.prefill import ASSUMED_PREFILL, PrefillCost
from mcp_vllm.link.protocol import GroupLayout, group_index
from mcp_vllm.store.ram import ChunkKey

# Of a chunk of which no engine has said it.
ASSUMED_TOKENS = 128


def by_group(names: Iterable[ChunkKey]) -> list[list[ChunkKey]]:
    """The names of each KV cache group, in their order."""
    groups: dict[int, list[ChunkKey]] = {}
    for name in names:
        groups.setdefault(group_index(name.key), []).append(name)
    return list(groups.values())


class SavedPrefill:
    """Milliseconds of prefill that a chunk saves, for the policies; any thread may ask.

    Args:
        costs: by namespace, as engines measured them.
        groups: by namespace, what engines said their chunks are.
    """

    def __init__(
        self,
        costs: Mapping[bytes, PrefillCost],
        groups: Mapping[bytes, Sequence[GroupLayout]],
    ) -> None:
        self._costs = costs
        self._groups = groups

    def ms_of(self, name: ChunkKey) -> float:
        groups, number = self._groups.get(name.namespace, ()), group_index(name.key)
        tokens = groups[number].tokens if number < len(groups) else 0
        cost = self._costs.get(name.namespace, ASSUMED_PREFILL)
        rate = (cost if cost.is_sound else ASSUMED_PREFILL).tokens_s
        return 1000 * (tokens or ASSUMED_TOKENS) / rate
