"""The image of a SmartCache that survives a restart: what was learned, and every block's history.

    magic "MCPS" | version, u16 | bins, u16 | features, u16 | levels, u16 | records, u32
    | hazards (rows 0, 1) | weights | records | features | blake3 of all before, 32 bytes

All numbers are little endian. Ages are kept in place of times: the next process has another clock.
Records come back as ghosts, oldest first. A reader takes an image only if its size is the one that
the header implies and its checksum is right.
"""

from __future__ import annotations

import struct

import blake3
import numpy as np

from mcp_vllm.errors import McpError
from mcp_vllm.store.smart_cache import layout
from mcp_vllm.store.smart_cache.ages import enter_bin
from mcp_vllm.store.smart_cache.hazard import curve_of, refresh
from mcp_vllm.store.smart_cache.layout import COUNTED, State
from mcp_vllm.store.smart_cache.records import find_or_add

VERSION = 1
_HEADER = struct.Struct("<4sHHHHI")
_MAGIC = b"MCPS"
_CHECKSUM_BYTES = 32
_SAVED = np.dtype(
    [
        ("fingerprint", "<u8"),
        ("age_s", "<f8"),
        ("uses", "<u2"),
        ("chain", "<u2"),
        ("turn", "u1"),
        ("use_class", "u1"),
        ("features", "u1", (layout.NUM_FEATURES,)),
    ]
)


def dump(state: State) -> bytes:
    """The image of a state."""
    slots = np.flatnonzero(state.records["flags"] & COUNTED)
    slots = slots[np.argsort(state.records["last_use_s"][slots], kind="stable")]
    saved = np.empty(len(slots), _SAVED)
    for name in ("fingerprint", "uses", "chain", "turn", "use_class"):
        saved[name] = state.records[name][slots]
    saved["age_s"] = state.seconds[layout.NOW] - state.records["last_use_s"][slots]
    saved["features"] = state.features[slots]
    body = b"".join(
        (
            _HEADER.pack(
                _MAGIC,
                VERSION,
                layout.NUM_BINS,
                layout.NUM_FEATURES,
                layout.NUM_LEVELS,
                len(saved),
            ),
            state.hazards[:2].astype("<f8").tobytes(),
            state.weights.astype("<f8").tobytes(),
            saved.tobytes(),
        )
    )
    return body + blake3.blake3(body).digest()


def load(state: State, image: bytes, now_s: float) -> None:
    """Fill an empty state from an image.

    Raises:
        McpError: the image is damaged, or of another version; the state is unchanged.
    """
    num_records = _checked(state, image)
    hazards, weights = state.hazards[:2], state.weights
    start = _HEADER.size
    hazards[:] = np.frombuffer(image, "<f8", hazards.size, start).reshape(hazards.shape)
    start += hazards.nbytes
    weights[:] = np.frombuffer(image, "<f8", weights.size, start).reshape(weights.shape)
    saved = np.frombuffer(image, _SAVED, num_records, start + weights.nbytes)
    state.seconds[layout.NOW] = now_s
    for each in saved[-int(state.numbers[layout.MAX_GHOSTS]) :]:
        _take(state, each, now_s)
    refresh(state, 1.0)


def _take(state: State, each: np.void, now_s: float) -> None:
    slot = find_or_add(state, each["fingerprint"])
    record = state.records[slot]
    if record["flags"] & COUNTED:
        return
    for name in ("uses", "chain", "turn"):
        record[name] = each[name]
    record["use_class"] = min(int(each["use_class"]), layout.NUM_USE_CLASSES - 1)
    record["last_use_s"] = now_s - max(0.0, float(each["age_s"]))
    state.features[slot] = np.minimum(each["features"], layout.NUM_LEVELS - 1)
    record["curve"] = curve_of(state, slot)
    age_s = now_s - record["last_use_s"]
    bin_ = int(np.searchsorted(layout.EDGES, age_s, side="right")) - 1
    enter_bin(state, slot, min(bin_, layout.NUM_BINS))


def _checked(state: State, image: bytes) -> int:
    """The number of records of a sound image."""
    remedy = "; delete it, and the cache learns anew"
    if len(image) < _HEADER.size + _CHECKSUM_BYTES or image[:4] != _MAGIC:
        raise McpError("this is no saved SmartCache" + remedy)
    _, version, *sizes, num_records = _HEADER.unpack_from(image)
    ours = [layout.NUM_BINS, layout.NUM_FEATURES, layout.NUM_LEVELS]
    if version != VERSION or sizes != ours:
        raise McpError(f"the saved SmartCache is of version {version}, not {VERSION}" + remedy)
    numbers = state.hazards[:2].nbytes + state.weights.nbytes
    expected = _HEADER.size + numbers + num_records * _SAVED.itemsize + _CHECKSUM_BYTES
    body, checksum = image[:-_CHECKSUM_BYTES], image[-_CHECKSUM_BYTES:]
    if len(image) != expected or blake3.blake3(body).digest() != checksum:
        raise McpError("the saved SmartCache is damaged" + remedy)
    if not np.isfinite(np.frombuffer(body, "<f8", numbers // 8, _HEADER.size)).all():
        raise McpError("the saved SmartCache holds values that are no numbers" + remedy)
    return int(num_records)
