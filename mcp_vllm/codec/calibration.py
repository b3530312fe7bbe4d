"""What is known of a model's KV before any chunk is seen: the transform of the lossy tiers.

Computed once per model (calibrate.py), kept in one ``.npz`` without pickle, read by engines and
agents at start-up. Immutable and shared by all threads. Its **fingerprint** is in every frame coded
with it: a decoder with another calibration refuses the frame.

A *band* is a set of heads, K and V of one layer, whose channels are decorrelated together:

    coefficients = (values - mean) @ analysis       [token, channel] -> [token, coefficient]
    values      ~= coefficients @ synthesis + mean

Coefficients are in a unit in which an error of any of them harms the model's output equally, and
sorted by falling standard deviation. K is first turned back by its rotary angle, where the model
has one: pair (i, i + rotary/2) of a head at position p by ``-p * frequencies[i]``.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from mcp_vllm.codec.errors import CodecError
from mcp_vllm.codec.planes import Source

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from mcp_vllm.codec.kernel import Float32s
    from mcp_vllm.codec.multiply import Panels

FORMAT = 2
FINGERPRINT_SIZE = 16
MAX_BANDS = 4096
MAX_BAND_CHANNELS = 4096
# Levels of tokens are cut off at this, and at its negative.
MAX_LEVEL = 3
MAX_FILE_BYTES = 4 << 30
_MAX_DESCRIPTION_BYTES = 16 << 20
# RuntimeError: of members that are encrypted, or nested too deeply.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile)
# What is restored stays finite, whatever a frame says: 2^19 steps of up to 3e6, 4096 terms.
_LARGEST = 1e20
_ARRAYS = (
    "mean",
    "analysis",
    "synthesis",
    "deviation",
    "frequencies",
    "level_weights",
    "usual_level",
)


def calibration_file(cache_folder: Path, weights_identity: str) -> Path:
    """Where the calibration of the model with weights of that identity is kept."""
    return cache_folder / "calibrations" / f"{weights_identity}.npz"


@dataclass(frozen=True, eq=False)
class Band:
    """One transform. All arrays float32.

    Attributes:
        sources: the heads, in the order of their channels in ``mean``.
        mean: [channel]
        analysis: [channel, coefficient]
        synthesis: [coefficient, channel]
        deviation: [coefficient], standard deviation on the calibration text, falling.
        frequencies: [layer's rotary pair], radians per token, of the band's K heads; may be empty.
        level_weights: [channel], usual_level: [1]. Not all tokens matter equally, and it shows in
            their values: (values - mean) @ level_weights + usual_level is by how many half
            octaves a token's step may be coarser than others'.
    """

    sources: tuple[Source, ...]
    mean: Float32s
    analysis: Float32s
    synthesis: Float32s
    deviation: Float32s
    frequencies: Float32s
    level_weights: Float32s
    usual_level: Float32s

    @cached_property
    def analysis_panels(self) -> Panels:
        """level_weights as the first column, then analysis."""
        from mcp_vllm.codec.multiply import Panels  # numba, which engines must not load early

        return Panels(np.column_stack([self.level_weights, self.analysis]))

    @cached_property
    def synthesis_panels(self) -> Panels:
        from mcp_vllm.codec.multiply import Panels

        return Panels(self.synthesis)

    def pack(self) -> None:
        """Make both panels now."""
        _ = self.analysis_panels, self.synthesis_panels

    def check(self) -> None:
        """CodecError unless shapes agree and values are finite, so that decoding cannot fault."""
        channels, coefficients = self.analysis.shape if self.analysis.ndim == 2 else (0, 0)
        wrong = (
            not 1 <= coefficients <= channels <= MAX_BAND_CHANNELS
            or not self.sources
            or channels % len(self.sources)
            or self.mean.shape != (channels,)
            or self.synthesis.shape != (coefficients, channels)
            or self.deviation.shape != (coefficients,)
            or self.frequencies.ndim != 1
            or 2 * len(self.frequencies) > channels // len(self.sources)
            or self.level_weights.shape != (channels,)
            or self.usual_level.shape != (1,)
        )
        if wrong:
            raise CodecError(f"calibration band {self.sources[:1]} has arrays of wrong shapes")
        for name in _ARRAYS:
            values = getattr(self, name)
            if values.dtype != np.float32 or not (np.abs(values) <= _LARGEST).all():
                raise CodecError(
                    f"calibration band {self.sources[0]} has a {name} that is no float, or one "
                    f"above {_LARGEST:g}"
                )
        if (np.diff(self.deviation) > 0).any() or self.deviation[-1] < 0:
            raise CodecError(f"calibration band {self.sources[0]}: deviations do not fall")


@dataclass(frozen=True, eq=False)
class Calibration:
    """The bands of a model, no head in two of them, and how its coefficients are distributed.

    Attributes:
        model: what it was computed from, for messages.
        tail: float32 [TAIL_POINTS]; how often a coefficient is further from zero than
            ``TAIL_REACH * (i / TAIL_POINTS)**2`` standard deviations; falls from 1 to about 0.
    """

    model: str
    bands: tuple[Band, ...]
    tail: Float32s

    TAIL_POINTS = 256
    TAIL_REACH = 16.0

    def __post_init__(self) -> None:
        for band in self.bands:
            band.check()
        sources = [source for band in self.bands for source in band.sources]
        if not sources or len(set(sources)) != len(sources):
            raise CodecError("a calibration needs bands, and each head in one of them only")
        is_plain = self.tail.shape == (self.TAIL_POINTS,) and self.tail.dtype == np.float32
        falls = is_plain and (np.diff(self.tail) <= 0).all()
        if not falls or self.tail[0] > 1 or self.tail[-1] < 0:
            raise CodecError("the tail of a calibration must fall from 1 to 0")

    @cached_property
    def fingerprint(self) -> bytes:
        """FINGERPRINT_SIZE bytes that depend on everything but the model's name."""
        digest = blake3(self._description(model="").encode())
        for values in [self.tail, *(getattr(b, name) for b in self.bands for name in _ARRAYS)]:
            digest.update(np.ascontiguousarray(values, "<f4").tobytes())
        return digest.digest(FINGERPRINT_SIZE)

    def __str__(self) -> str:
        return f"{self.fingerprint.hex()} ({self.model})"

    def _description(self, model: str) -> str:
        return json.dumps(
            {"format": FORMAT, "model": model, "bands": [band.sources for band in self.bands]}
        )

    def save(self, path: Path) -> None:
        """Write the file; the folder is made where it is missing."""
        members: dict[str, Any] = {
            "description": np.frombuffer(self._description(self.model).encode(), np.uint8),
            "tail": self.tail,
        }
        for index, band in enumerate(self.bands):
            members |= {f"{name}_{index}": getattr(band, name) for name in _ARRAYS}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, **members)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a file of ``save``; CodecError when it is not one, or is damaged."""
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise CodecError(f"calibration {path} is larger than {MAX_FILE_BYTES} bytes")
            with zipfile.ZipFile(path) as members:
                calibration = cls._of(members)
            for band in calibration.bands:
                band.pack()  # not while the first chunk waits
            return calibration
        except CodecError as error:
            raise CodecError(f"calibration {path} is not usable: {error}") from error
        except _UNREADABLE as error:
            raise CodecError(
                f"cannot read the calibration {path}: {error}; make it anew with"
                " `mcp-vllm codec calibrate MODEL`"
            ) from error

    @classmethod
    def _of(cls, members: zipfile.ZipFile) -> Calibration:
        text = _member(members, "description", _MAX_DESCRIPTION_BYTES).tobytes()
        description = json.loads(text)
        if description["format"] != FORMAT:
            raise CodecError(f"its format is {description['format']}, this version reads {FORMAT}")
        if len(description["bands"]) > MAX_BANDS:
            raise CodecError(f"it has more than {MAX_BANDS} bands")
        bands = []
        for index, sources in enumerate(description["bands"]):
            arrays = {name: _member(members, f"{name}_{index}") for name in _ARRAYS}
            bands.append(Band(tuple(Source(*_checked(source)) for source in sources), **arrays))
        return cls(str(description["model"]), tuple(bands), _member(members, "tail"))


def _checked(source: list[Any]) -> tuple[Any, ...]:
    layer, kind, head = source
    if type(layer) is not int or kind not in ("k", "v", "latent") or type(head) is not int:
        raise CodecError(f"{source} names no head of a layer")
    return layer, kind, head


def _member(
    members: zipfile.ZipFile, name: str, max_bytes: int = 5 * MAX_BAND_CHANNELS**2
) -> NDArray[Any]:
    """One array; what is stored is bounded, and never compressed, before anything is allocated."""
    entry = members.getinfo(name + ".npy")
    if entry.file_size > max_bytes or entry.compress_type != zipfile.ZIP_STORED:
        raise CodecError(f"member {name} is compressed or larger than {max_bytes} bytes")
    with members.open(entry) as file:
        content = io.BytesIO(file.read(max_bytes))
    if np.lib.format.read_magic(content) != (1, 0):  # type: ignore[no-untyped-call]
        raise CodecError(f"member {name} is of another array format")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(content)  # type: ignore[no-untyped-call]
    size = math.prod(shape) * dtype.itemsize
    # numpy's own reader would allocate what the header claims before it looks for the bytes.
    if dtype.hasobject or is_fortran or size != len(content.getbuffer()) - content.tell():
        raise CodecError(f"member {name} is no plain array of the size that it claims")
    return np.frombuffer(content.read(), dtype).reshape(shape)
