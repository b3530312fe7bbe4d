"""The layers of a transformers cache: what each holds, and how it is filled again.

Four kinds are known: full and sliding-window attention, each growing (dynamic) or of a fixed size
(static). A layer is filled by its own `update`, so that whatever a release keeps beside keys and
values comes out right; only the number of tokens seen by a window that has moved is set.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mcp_vllm.hf import library
from mcp_vllm.hf.errors import DamagedCacheError, UnsupportedCacheError

Kind = Literal["full", "sliding", "static", "static_sliding"]
Length = Annotated[int, Meta(ge=0, le=1 << 40)]

_KIND_OF_CLASS: dict[str, Kind] = {
    "DynamicLayer": "full",
    "DynamicSlidingWindowLayer": "sliding",
    "StaticLayer": "static",
    "StaticSlidingWindowLayer": "static_sliding",
}


class LayerState(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """What a layer is beside its tensors.

    ``seen`` tokens went through it. It holds at most ``capacity`` of them, the last; 0 stands for
    any number.
    """

    kind: Kind
    seen: Length
    capacity: Length

    @property
    def num_held(self) -> int:
        return min(self.seen, self.capacity) if self.capacity else self.seen


def state_of(layer: Any, number: int) -> LayerState:
    """UnsupportedCacheError names the layer by its number if it is none of the known kinds."""
    kind = _KIND_OF_CLASS.get(type(layer).__name__)
    # By identity, not by name alone: a class of the user's own may behave differently.
    if kind is None or type(layer) is not getattr(library.cache_utils(), type(layer).__name__):
        raise UnsupportedCacheError(
            f"layer {number} is a {type(layer).__name__}; known are {', '.join(_KIND_OF_CLASS)}"
        )
    if getattr(layer, "record_past", False):
        raise UnsupportedCacheError(
            f"layer {number} keeps tokens beyond its window for assisted decoding; "
            "export a cache that was not used for it"
        )
    if kind == "sliding":
        capacity = layer.sliding_window - 1
    else:
        capacity = layer.max_cache_len if kind != "full" else 0
    return LayerState(kind, int(layer.get_seq_length()), capacity)


def held_tensors(layer: Any, state: LayerState, number: int) -> tuple[Any, Any] | None:
    """Keys and values [batch, head, token, channel] of the tokens that count, views of the layer's
    own; None for a layer that saw no token."""
    if state.seen == 0:
        return None
    keys, values = layer.keys, layer.values
    if state.kind in ("static", "static_sliding"):
        keys, values = keys[:, :, : state.num_held], values[:, :, : state.num_held]
    if keys.shape[2] != state.num_held:
        raise UnsupportedCacheError(
            f"layer {number} holds {keys.shape[2]} tokens where {state.num_held} belong; "
            "export a cache that was filled by the model only"
        )
    return keys, values


def check_tensors(state: LayerState, keys: Any, values: Any, number: int) -> None:
    """Whether untrusted tensors are what a layer in this state may hold."""
    torch = library.torch()
    for tensor in (keys, values):
        if (
            not isinstance(tensor, torch.Tensor)
            or not tensor.dtype.is_floating_point
            or tensor.dim() != 4
            or tensor.numel() == 0
            or tensor.shape[2] != state.num_held
        ):
            raise DamagedCacheError(
                f"layer {number} does not hold {state.num_held} tokens as [batch, head, token, "
                "channel]"
            )
    if keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
        raise DamagedCacheError(f"keys and values of layer {number} do not fit together")


def fill(layer: Any, state: LayerState, keys: Any, values: Any) -> None:
    """Bring a fresh layer into this state; the tensors were checked."""
    layer.update(keys, values)
    if state.kind == "sliding":
        layer.cumulative_length = state.seen
    elif state.kind == "static_sliding":
        layer.cumulative_length_int = state.seen
