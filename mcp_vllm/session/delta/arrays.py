"""Arrays of numpy and torch as the bits they hold, and back.

A context is compared, hashed and coded by its bits, so NaN payloads and -0.0 survive and types that
numpy lacks (bfloat16, 8-bit floats) need no arithmetic. torch and ml_dtypes are imported only when
an array needs them.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from mcp_vllm.codec import ChunkLayout
from mcp_vllm.codec.layout import Element
from mcp_vllm.session.delta.errors import ArrayError

Library = Literal["numpy", "torch"]
Bits = NDArray[Any]

DIGEST_BYTES = 8
MAX_DIMENSIONS = 16
MAX_NAME_CHARS = 256

# Size in bytes, and what a codec is told; a type without a float's exponent is coded as bytes.
_TYPES: dict[str, tuple[int, Element]] = {
    "bfloat16": (2, "bf16"),
    "float16": (2, "f16"),
    "float32": (4, "f32"),
    "float64": (8, "u8"),
    "float8_e4m3fn": (1, "f8"),
    "float8_e5m2": (1, "f8"),
    "bool": (1, "u8"),
    "int8": (1, "u8"),
    "int16": (2, "u8"),
    "int32": (4, "u8"),
    "int64": (8, "u8"),
    "uint8": (1, "u8"),
    "uint16": (2, "u8"),
    "uint32": (4, "u8"),
    "uint64": (8, "u8"),
}
_NOT_IN_NUMPY = {"bfloat16", "float8_e4m3fn", "float8_e5m2"}


@dataclass(frozen=True)
class HostArray:
    """An array's shape and bits: unsigned integers of the element's width, any strides."""

    bits: Bits
    dtype: str
    library: Library

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    def digest(self) -> bytes:
        """8 bytes over type, shape and content; the library does not matter."""
        state = xxhash.xxh3_64(f"{self.dtype}{self.shape}".encode())
        state.update(flat_bytes_of(self.bits))
        return state.digest()


def flat_bytes_of(bits: Bits) -> memoryview:
    """The content in C order, copied only if the strides ask for it."""
    contiguous = np.ascontiguousarray(bits)
    return contiguous.reshape(-1).view(np.uint8).data if bits.size else memoryview(b"")


def element_size(dtype: str) -> int:
    """Bytes of one element of a known type."""
    return _TYPES[dtype][0]


def is_known_type(dtype: str) -> bool:
    return dtype in _TYPES


def layout_of(dtype: str, shape: tuple[int, ...]) -> ChunkLayout:
    """What to tell a codec about the C-ordered content: the last axis holds the channels."""
    _, element = _TYPES[dtype]
    return ChunkLayout(element, max(1, shape[-1]) if shape and element != "u8" else 1)


def empty_bits(dtype: str, shape: tuple[int, ...]) -> Bits:
    """Unsigned integers of the type's width, with any content."""
    return np.empty(shape, f"u{element_size(dtype)}")


def host_arrays(context: Mapping[str, object]) -> dict[str, HostArray]:
    """Every array of a context; ArrayError names the first that cannot be one."""
    return {_checked_name(name): _host_array(name, value) for name, value in context.items()}


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARS:
        raise ArrayError(
            f"array name {str(name)[:64]!r} must be a text of at most {MAX_NAME_CHARS} characters"
        )
    return name


def _host_array(name: str, value: object) -> HostArray:
    if isinstance(value, np.ndarray):
        return _of_numpy(name, value)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _of_torch(name, value, torch)
    raise ArrayError(f"{name} is a {type(value).__name__}, not a numpy array or a torch tensor")


def _of_numpy(name: str, array: NDArray[Any]) -> HostArray:
    dtype = array.dtype.name
    _check_shape_and_type(name, dtype, array.ndim)
    if not array.dtype.isnative:
        raise ArrayError(f"{name} is not in this machine's byte order; convert it first")
    return HostArray(array.view(f"u{element_size(dtype)}"), dtype, "numpy")


def _of_torch(name: str, tensor: Any, torch: Any) -> HostArray:
    dtype = str(tensor.dtype).removeprefix("torch.")
    _check_shape_and_type(name, dtype, tensor.dim())
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ArrayError(f"{name} is not a dense tensor on the CPU; call .cpu() first")
    width = element_size(dtype)
    signed = getattr(torch, f"int{8 * width}")
    return HostArray(tensor.detach().view(signed).numpy().view(f"u{width}"), dtype, "torch")


def _check_shape_and_type(name: str, dtype: str, dimensions: int) -> None:
    if not is_known_type(dtype):
        raise ArrayError(f"{name} is of type {dtype}; known types: {', '.join(_TYPES)}")
    if dimensions > MAX_DIMENSIONS:
        raise ArrayError(f"{name} has {dimensions} axes; at most {MAX_DIMENSIONS} are allowed")


def library_array(array: HostArray) -> Any:
    """The numpy array or torch tensor of these bits, whose memory it shares.

    Raises ArrayError when the library, or for numpy the package of its extra types, is missing.
    """
    if array.library == "torch":
        torch = _imported("torch", array.dtype)
        signed = array.bits.view(f"i{element_size(array.dtype)}")
        return torch.from_numpy(signed).view(getattr(torch, array.dtype))
    if array.dtype in _NOT_IN_NUMPY:
        extra_types = _imported("ml_dtypes", array.dtype)
        return array.bits.view(getattr(extra_types, array.dtype))
    return array.bits.view(array.dtype)


def _imported(package: str, dtype: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ArrayError(
            f"the context holds {dtype} arrays that need the package {package}; install it"
        ) from error


def size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * element_size(dtype)
