"""A span of layers in a transformers model that a stage runs: a decoder layer and its cache layer.

The decoder layer stands in the place of the whole span, so what is left is an ordinary model of
fewer layers, and so is its cache. The cache layer holds no keys and values: it names the sessions
at the stage, one a row of the batch, and follows what transformers does to a cache (cropping,
reordering beams, copying, garbage collection).
"""

from __future__ import annotations

import uuid
import weakref
from typing import Any, Self

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from mcp_vllm.split.errors import SplitError
from mcp_vllm.split.sessions import StageSessions


class RemoteCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """The sessions of a batch, each of them without its padding.

    Attributes:
        seen: columns that went through, padding included.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, sessions: StageSessions) -> None:
        super().__init__()
        self.seen = 0
        self._sessions = sessions
        self._names: list[str] = []
        # Position of a row's first token: the stage counts from 0.
        self._offsets: list[int] = []
        weakref.finalize(self, _abandon, sessions, self._names)

    def run(
        self, hidden: torch.Tensor, is_token: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [row, column, width] after the span; those of padding are zeros.

        Args:
            is_token: [row, column], False: padding.
            positions: [row, column].

        Raises SplitError: tokens do not follow on those before; and what `StageSessions.run` does.
        """
        if not self._names:
            self._names += [uuid.uuid4().hex for _ in range(hidden.shape[0])]
            self._offsets = [-1] * len(self._names)
        if len(self._names) != hidden.shape[0]:
            raise SplitError(f"a batch of {hidden.shape[0]} goes on one of {len(self._names)}")
        inputs = {}
        for row, name in enumerate(self._names):
            mine = is_token[row]
            if mine.any():
                self._check_positions(row, positions[row][mine])
                inputs[name] = hidden[row][mine]
        results = self._sessions.run(inputs) if inputs else {}
        output = torch.zeros_like(hidden)
        for row, name in enumerate(self._names):
            if name in results:
                output[row][is_token[row]] = results[name].to(hidden.device, hidden.dtype)
        self.seen += hidden.shape[1]
        return output

    def epsilon(self) -> float:
        """The most that a row's session has spent of its privacy. Raises SplitError: no noise."""
        return max((self._sessions.epsilon(name) for name in self._names), default=0.0)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("a span has no keys and values here")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any) -> Any:
        raise AssertionError("a span has no keys and values here")

    def reset(self) -> None:
        _abandon(self._sessions, self._names)
        self._names.clear()
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """As DynamicLayer: a positive number is the length to keep."""
        number = -tokens_to_remove
        if tokens_to_remove > 0:
            number = max(0, self.seen - tokens_to_remove)
        for name in self._names:
            self._sessions.truncate(name, max(0, self._sessions.length(name) - number))
        self.seen = max(0, self.seen - number)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(len(self._names)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select(indices.tolist())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self)(self._sessions)
        copied.seen = self.seen
        copied._names += [self._fork(name) for name in self._names]
        copied._offsets = list(self._offsets)
        return copied

    def _select(self, rows: list[int]) -> None:
        """Rows of the batch from now on; one that is there twice is computed once more."""
        if not self._names:
            return
        kept: list[str] = []
        for name in (self._names[row] for row in rows):
            kept.append(self._fork(name) if name in kept else name)
        self._offsets = [self._offsets[row] for row in rows]
        _abandon(self._sessions, [name for name in self._names if name not in kept])
        self._names[:] = kept

    def _fork(self, name: str) -> str:
        copy = uuid.uuid4().hex
        self._sessions.fork(name, copy)
        return copy

    def _check_positions(self, row: int, positions: torch.Tensor) -> None:
        length = self._sessions.length(self._names[row])
        if length == 0:
            self._offsets[row] = int(positions[0])
        first = length + self._offsets[row]
        expected = torch.arange(first, first + len(positions), device=positions.device)
        if not torch.equal(positions, expected):
            raise SplitError(
                f"row {row}: positions {positions.tolist()[:4]}... do not follow on the "
                f"{length} tokens before; a stage takes texts without gaps"
            )


class RemoteSpan(torch.nn.Module):
    """The decoder layer in a span's place; `layer_idx` is its number among those that are left."""

    def __init__(self, sessions: StageSessions, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self._sessions = sessions
        self._mask: torch.Tensor | None = None

    def note_mask(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the model's forward: which tokens are padding."""
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            raise SplitError("a split model takes an attention_mask of [row, column] only")
        self._mask = mask

    @torch.no_grad()
    def forward(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        position_ids: torch.Tensor,
        past_key_values: DynamicCache | None = None,
        **__: Any,
    ) -> torch.Tensor:
        shape = hidden_states.shape[:2]
        is_token = torch.ones(shape, dtype=torch.bool, device=hidden_states.device)
        if self._mask is not None:
            is_token = self._mask[:, -shape[1] :].bool().to(hidden_states.device)
        layer = self._layer_of(past_key_values)
        return layer.run(hidden_states, is_token, position_ids.expand(shape))

    def _layer_of(self, cache: DynamicCache | None) -> RemoteCacheLayer:
        """Ours of this cache; it is put in at the cache's first use."""
        if cache is None:
            return RemoteCacheLayer(self._sessions)  # its sessions end with it
        if type(cache) is not DynamicCache:
            raise SplitError(f"a split model works with a DynamicCache, not {type(cache).__name__}")
        while len(cache.layers) <= self.layer_idx:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[self.layer_idx]
        if not isinstance(layer, RemoteCacheLayer):
            if layer.get_seq_length() > 0:
                raise SplitError("this cache was filled by a model that is not split")
            layer = cache.layers[self.layer_idx] = RemoteCacheLayer(self._sessions)
        return layer


def _abandon(sessions: StageSessions, names: list[str]) -> None:
    for name in names:
        sessions.abandon(name)
