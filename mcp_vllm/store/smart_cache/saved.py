"""The image of a SmartCache that survives a restart: what was learned, and every block's history.

    magic "MCPS" | version, u16 | bins, u16 | kinds, u16 | tables, u16 | records, u32
    | accesses, u64 | requests, u64
    | hazards, rows 0 and 1 | tables, rows 0 and 1 | records | blake3 of all before, 32 bytes

All numbers are little endian. Ages are kept in place of times: the next process has another clock.
Records come back as ghosts, oldest first. A reader takes an image only if its size is the one that
the header implies and its checksum is right.
"""

from __future__ import annotations

import struct

import blake3
import numpy as np
from numpy.typing import NDArray

from mcp_vllm.errors import McpError
from mcp_vllm.store.smart_cache import layout
from mcp_vllm.store.smart_cache.ages import advance, enter_bin
from mcp_vllm.store.smart_cache.hazard import refresh
from mcp_vllm.store.smart_cache.layout import COUNTED, State, step
from mcp_vllm.store.smart_cache.records import find_or_add

VERSION = 3
_HEADER = struct.Struct("<4sHHHHIQQ")
_MAGIC = b"MCPS"
_CHECKSUM_BYTES = 32
_MOST_ACCESSES = 1 << 60
_SAVED = np.dtype(
    [
        ("fingerprint", "<u8"),
        ("age_s", "<f8"),
        ("uses", "<u2"),
        ("kind", "<u2"),
        ("turn", "u1"),
    ]
)


def dump(state: State, now_s: float, max_bytes: int) -> bytes:
    """The image of a state: of its records, those used last, as many as there is room for.

    Raises:
        McpError: there is not room for what was learned, without any record.
    """
    fixed = _HEADER.size + state.hazards[:2].nbytes + state.tables[:2].nbytes + _CHECKSUM_BYTES
    if fixed > max_bytes:
        raise McpError(f"{fixed} bytes are more than its share of {max_bytes}")
    advance(state, now_s)
    slots = np.flatnonzero(state.records["flags"] & COUNTED)
    slots = slots[np.argsort(state.records["last_use_s"][slots], kind="stable")]
    num_saved = min(len(slots), (max_bytes - fixed) // _SAVED.itemsize)
    slots = slots[len(slots) - num_saved :]
    saved = np.empty(len(slots), _SAVED)
    for name in ("fingerprint", "uses", "kind", "turn"):
        saved[name] = state.records[name][slots]
    saved["age_s"] = state.seconds[layout.NOW] - state.records["last_use_s"][slots]
    body = b"".join(
        (
            _HEADER.pack(
                _MAGIC,
                VERSION,
                layout.NUM_BINS,
                layout.NUM_KINDS,
                layout.NUM_TABLES,
                len(saved),
                int(state.numbers[layout.NUM_ACCESSES]),
                int(state.numbers[layout.NUM_REQUESTS]),
            ),
            state.hazards[:2].astype("<f8").tobytes(),
            state.tables[:2].astype("<f8").tobytes(),
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
    accesses, requests = _HEADER.unpack_from(image)[-2:]
    state.numbers[layout.NUM_ACCESSES] = min(accesses, _MOST_ACCESSES)
    state.numbers[layout.NUM_REQUESTS] = min(requests, _MOST_ACCESSES)
    state.numbers[layout.NEXT_REFRESH] = state.numbers[layout.NUM_ACCESSES]
    hazards, tables = state.hazards[:2], state.tables[:2]
    start = _HEADER.size
    hazards[:] = np.frombuffer(image, "<f8", hazards.size, start).reshape(hazards.shape)
    start += hazards.nbytes
    tables[:] = np.frombuffer(image, "<f8", tables.size, start).reshape(tables.shape)
    saved = np.frombuffer(image, _SAVED, num_records, start + tables.nbytes)
    saved = saved[-int(state.numbers[layout.MAX_GHOSTS]) :]
    state.seconds[layout.NOW] = now_s
    ages_s = np.fmax(saved["age_s"], 0.0)
    bins = np.searchsorted(layout.EDGES, ages_s, side="right") - 1
    _take(
        state,
        saved["fingerprint"].astype(np.uint64),
        now_s - ages_s,
        saved["uses"].astype(np.uint16),
        saved["turn"].astype(np.uint8),
        np.minimum(saved["kind"], layout.NUM_KINDS - 1).astype(np.uint16),
        np.minimum(bins, layout.NUM_BINS),
    )
    refresh(state, 1.0)


@step
def _take(
    state: State,
    fingerprints: NDArray[np.uint64],
    last_uses_s: NDArray[np.float64],
    uses: NDArray[np.uint16],
    turns: NDArray[np.uint8],
    kinds: NDArray[np.uint16],
    bins: NDArray[np.int64],
) -> None:
    """Make a ghost of each, the oldest first."""
    for each in range(len(fingerprints)):
        slot = find_or_add(state, fingerprints[each])
        record = state.records[slot]
        if record.flags & COUNTED:
            continue
        record.last_use_s = last_uses_s[each]
        record.uses = uses[each]
        record.turn = turns[each]
        record.kind = kinds[each]
        enter_bin(state, slot, bins[each])


def _checked(state: State, image: bytes) -> int:
    """The number of records of a sound image."""
    remedy = "; delete it, and the cache learns anew"
    if len(image) < _HEADER.size + _CHECKSUM_BYTES or image[:4] != _MAGIC:
        raise McpError("this is no saved SmartCache" + remedy)
    _, version, *sizes, num_records, _, _ = _HEADER.unpack_from(image)
    ours = [layout.NUM_BINS, layout.NUM_KINDS, layout.NUM_TABLES]
    if version != VERSION or sizes != ours:
        raise McpError(f"the saved SmartCache is of version {version}, not {VERSION}" + remedy)
    numbers = state.hazards[:2].nbytes + state.tables[:2].nbytes
    expected = _HEADER.size + numbers + num_records * _SAVED.itemsize + _CHECKSUM_BYTES
    body, checksum = image[:-_CHECKSUM_BYTES], image[-_CHECKSUM_BYTES:]
    if len(image) != expected or blake3.blake3(body).digest() != checksum:
        raise McpError("the saved SmartCache is damaged" + remedy)
    if not np.isfinite(np.frombuffer(body, "<f8", numbers // 8, _HEADER.size)).all():
        raise McpError("the saved SmartCache holds values that are no numbers" + remedy)
    return int(num_records)
