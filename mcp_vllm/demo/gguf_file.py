"""A reader for GGUF model files that is quick on large vocabularies.

The reader of the `gguf` package builds numpy views for each metadata string, which takes 15 s for a
vocabulary of 262,144 tokens; this one reads the same file in under one second. It only reads: the
dequantising kernels are those of the `gguf` package. Format: GGUF specification, version 3, little
endian. Callers verify the file's checksum first, so its lengths are trusted.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from mcp_vllm.errors import McpError

_MAGIC = b"GGUF"
_VERSION = 3
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALAR_FORMATS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


class GgufFormatError(McpError):
    """The file is not a GGUF file that this reader understands."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` is in numpy order (slowest dimension first)."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    rows: np.ndarray  # uint8 (num_rows, row_bytes), a view of the mapped file

    def float32_rows(self, start: int, stop: int) -> np.ndarray:
        """Dequantise rows [start, stop) to float32 of shape (stop - start, shape[-1])."""
        rows = self.rows[start:stop]
        if self.kind == GGMLQuantizationType.F32:
            return rows.view(np.float32)
        return dequantize(rows, self.kind)


class GgufFile:
    """Metadata and tensors of one GGUF file, mapped read-only for the object's lifetime."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._offset = 4
        if self._bytes[:4] != _MAGIC or self._scalar("I") != _VERSION:
            raise GgufFormatError(
                f"{path}: not a GGUF version {_VERSION} file; delete it and fetch it again"
            )
        num_tensors, num_fields = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        self.tensors = {tensor.name: tensor for tensor in self._read_tensors(num_tensors)}

    def _read_tensors(self, num_tensors: int) -> Iterator[GgufTensor]:
        headers = []
        for _ in range(num_tensors):
            name = self._string()
            dims = [self._scalar("Q") for _ in range(self._scalar("I"))]
            kind = GGMLQuantizationType(self._scalar("I"))
            headers.append((name, tuple(reversed(dims)), kind, self._scalar("Q")))
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        start = -(-self._offset // alignment) * alignment
        for name, shape, kind, offset in headers:
            block_size, block_bytes = GGML_QUANT_SIZES[kind]
            num_rows = int(np.prod(shape[:-1]))
            row_bytes = shape[-1] // block_size * block_bytes
            rows = np.frombuffer(self._bytes, np.uint8, num_rows * row_bytes, start + offset)
            yield GgufTensor(name, shape, kind, rows.reshape(num_rows, row_bytes))

    def _scalar(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        (value,) = layout.unpack_from(self._bytes, self._offset)
        self._offset += layout.size
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        self._offset += length
        return self._bytes[self._offset - length : self._offset].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALAR_FORMATS[kind])
        item_kind, count = self._scalar("I"), self._scalar("Q")
        if item_kind in (_STRING, _ARRAY):
            return [self._value(item_kind) for _ in range(count)]
        layout = struct.Struct(f"<{count}{_SCALAR_FORMATS[item_kind]}")
        values = layout.unpack_from(self._bytes, self._offset)
        self._offset += layout.size
        return list(values)
