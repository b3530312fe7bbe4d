"""Activations as they travel between layers of two processes.

A decoder layer of vLLM hands on `hidden` and, in most models, `residual`, both [tokens, width]; the
next layer's norm adds them. Forms on the wire:

    raw    both as they are: exact
    packed both, as byte planes through zstandard: exact, and smaller
    fold   their sum in the model's dtype: half the bytes, one rounding
    fp8    the sum in 8-bit floats (e4m3) with a float32 scale a token: a quarter

Plain int8 is not offered: activations have a few channels hundreds of times larger than the rest,
and one scale for all destroys the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mcp_vllm.codec import ChunkLayout, get_codec
from mcp_vllm.codec.errors import FrameError
from mcp_vllm.codec.layout import Element
from mcp_vllm.split.errors import WireError

RAW, PACKED, FOLD, FP8 = "raw", "packed", "fold", "fp8"
EXACT_FORMS = (RAW, PACKED)
FORMS = (*EXACT_FORMS, FOLD, FP8)  # each less exact, or more work, than the one before
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_ELEMENTS: dict[torch.dtype, Element] = {
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
}
_ZSTD_LEVEL = 1
# Of real activations (Gemma-3-270m): what `packed` makes of them, from 0.83 of one token to 0.70
# of many; seconds a byte to pack and unpack them, and seconds more for each way of a step.
_PACKED_SHARE, _PACKING_S, _PACKING_WAY_S = 0.75, 1 / 150e6, 80e-6
_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max
_SCALE_BYTES = 4


@dataclass(frozen=True)
class Activations:
    """`hidden` and `residual` [tokens, width], one dtype; residual None: the model has none."""

    hidden: torch.Tensor
    residual: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> Activations:
        """The same in another dtype; itself, if that is its own."""
        if self.hidden.dtype == dtype:
            return self
        residual = None if self.residual is None else self.residual.to(dtype)
        return Activations(self.hidden.to(dtype), residual)


class FormCost(NamedTuple):
    """One way of a step's activations: bytes a token, and what encoding and decoding take, seconds
    a token and seconds beside."""

    token_bytes: float
    token_s: float
    way_s: float


@dataclass(frozen=True)
class Form:
    """How activations of one connection are encoded.

    Attributes:
        name: one of FORMS.
        width: elements a token in each tensor.
        dtype: of the model.
        has_residual: whether a residual belongs to them.
    """

    name: str
    width: int
    dtype: torch.dtype
    has_residual: bool

    def payload_bytes(self, num_tokens: int) -> int:
        """What `encode` makes of so many tokens: exactly, but `packed` at most."""
        if self.name == FP8:
            return num_tokens * (self.width + _SCALE_BYTES)
        tensors = 2 if self.has_residual and not self._is_folded else 1
        return num_tokens * self.width * self.dtype.itemsize * tensors

    @property
    def usual_cost(self) -> FormCost:
        """For plans: what is worth counting."""
        token_bytes = self.payload_bytes(1)
        if self.name != PACKED:
            return FormCost(token_bytes, 0.0, 0.0)
        return FormCost(_PACKED_SHARE * token_bytes, _PACKING_S * token_bytes, _PACKING_WAY_S)

    @property
    def _is_folded(self) -> bool:
        return self.name in (FOLD, FP8)

    def encode(self, activations: Activations) -> list[memoryview]:
        """Raw bytes of contiguous rows; on the CPU without a copy where the form needs none."""
        hidden, residual = activations.hidden, activations.residual
        if not self._is_folded:
            both = [_bytes_of(each) for each in (hidden, residual) if each is not None]
            return self._packed(b"".join(both)) if self.name == PACKED else both
        folded = hidden if residual is None else hidden + residual
        if self.name == FOLD:
            return [_bytes_of(folded)]
        wide = folded.float()
        scale = wide.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / _FP8_MAX
        return [_bytes_of((wide / scale).to(_FP8)), _bytes_of(scale)]

    def decode(self, payload: bytearray, num_tokens: int, device: torch.device) -> Activations:
        """The inverse of `encode`; the tensors may share memory with `payload`.

        Raises:
            WireError: `payload` is not as long as so many tokens are, or damaged.
        """
        if self.name == PACKED and 0 < len(payload) < self.payload_bytes(num_tokens):
            payload = self._unpacked(payload, num_tokens)
        if len(payload) != self.payload_bytes(num_tokens):
            raise WireError(
                f"{len(payload)} bytes of activations for {num_tokens} tokens, "
                f"not {self.payload_bytes(num_tokens)}"
            )
        if self.name == FP8:
            folded = self._from_fp8(payload, num_tokens)
            return self._unfolded(folded.to(device))
        flat = torch.frombuffer(payload, dtype=self.dtype)
        tensors = flat.view(-1, num_tokens, self.width).to(device)
        if self._is_folded:
            return self._unfolded(tensors[0])
        return Activations(tensors[0], tensors[1] if self.has_residual else None)

    def _packed(self, rows: bytes) -> list[memoryview]:
        """The rows as they are where that is not larger: their length tells which."""
        (part,) = get_codec("zstd", level=_ZSTD_LEVEL).encode(rows, self._layout).parts
        smaller = memoryview(part)
        return [smaller if smaller.nbytes < len(rows) else memoryview(rows)]

    def _unpacked(self, payload: bytearray, num_tokens: int) -> bytearray:
        rows = bytearray(self.payload_bytes(num_tokens))
        try:
            get_codec("zstd").decode_into([payload], memoryview(rows), self._layout)
        except FrameError as error:
            raise WireError(f"activations of {num_tokens} tokens: {error}") from error
        return rows

    @property
    def _layout(self) -> ChunkLayout:
        return ChunkLayout(_ELEMENTS[self.dtype])

    def _from_fp8(self, payload: bytearray, num_tokens: int) -> torch.Tensor:
        count = num_tokens * self.width
        values = torch.frombuffer(payload, dtype=_FP8, count=count).view(num_tokens, self.width)
        scale = torch.frombuffer(payload[count:], dtype=torch.float32, count=num_tokens)
        return (values.float() * scale.unsqueeze(1)).to(self.dtype)

    def _unfolded(self, folded: torch.Tensor) -> Activations:
        residual = torch.zeros_like(folded) if self.has_residual else None
        return Activations(folded, residual)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat: Any = tensor.detach().contiguous().cpu().view(torch.uint8).numpy()
    return memoryview(flat).cast("B")
