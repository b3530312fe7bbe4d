"""Deltas by the calibrated tiers: K and V of a layer together, turned back from where they are."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from lossy_kv import DIM, HEADS, LAYERS, calibration, rows

from mcp_vllm.codec import CodecError, rotation
from mcp_vllm.session.delta import (
    DamagedDeltaError,
    LossNotAcceptedError,
    compress_context,
    decompress_context,
    frames,
)

GIVEN = {"codec": "balanced", "calibration": calibration()}
TAKEN = {"accept": ["balanced"], "calibration": calibration()}


def context(start: int, stop: int, dtype=torch.bfloat16) -> dict:
    """K and V of tokens ``start`` to ``stop`` of one context, K rotated as models keep it."""
    values = rows(200, 5)[start:stop].reshape(stop - start, len(LAYERS), 2, HEADS, DIM)
    made = {"ids": np.arange(start, stop)}
    for number, layer in enumerate(LAYERS):
        keys = np.ascontiguousarray(values[:, number, 0])
        (band,) = (each for each in calibration().bands if each.sources[0].layer == layer)
        if len(band.frequencies):
            cosines, sines = rotation.angles(band.frequencies, start, stop - start)
            for head in range(HEADS):
                rotation.rotate(keys[:, head], cosines, sines)
        for name, tensor in (("keys", keys), ("values", values[:, number, 1])):
            as_cached = torch.from_numpy(tensor.copy()).permute(1, 0, 2)[None]
            made[f"layers.{layer}.{name}"] = as_cached.to(dtype)
    return made


def relative_error(exact: torch.Tensor, given: torch.Tensor) -> float:
    return float((exact.float() - given.float()).norm() / exact.float().norm())


@pytest.mark.parametrize("frame_bytes", [1, 1 << 22])
def test_a_tier_is_much_smaller_and_near_and_does_not_add_up_over_turns(frame_bytes, monkeypatch):
    monkeypatch.setattr(frames, "FRAME_BYTES", frame_bytes)
    turns = [context(0, length) for length in (120, 150, 200)]
    held: dict = {}
    for old, new in pairwise([{}, *turns]):
        delta = compress_context(old, new, held=held, **GIVEN)
        assert len(delta) < 0.95 * len(compress_context(old, new))
        before = held
        held = decompress_context(held, delta, **TAKEN)
        for name, array in before.items():
            if name != "ids":
                assert torch.equal(held[name][:, :, : array.shape[2]], array)
    assert (held["ids"] == turns[-1]["ids"]).all()
    for name, exact in turns[-1].items():
        if name != "ids":
            assert torch.equal(held[name][:, :, :16], exact[:, :, :16])
            assert not torch.equal(held[name], exact)
            assert relative_error(exact, held[name]) < 0.05


def test_a_window_is_turned_back_from_where_it_begins():
    window = context(100, 180)
    first = {name: 100 for name in window if name.endswith("keys")}
    right = compress_context({}, window, first_tokens=first, **GIVEN)
    wrong = compress_context({}, window, first_tokens=dict.fromkeys(first, 117), **GIVEN)
    assert len(right) < len(wrong)
    moved = context(110, 200)
    first = dict.fromkeys(first, 110)
    held = decompress_context({}, right, **TAKEN)
    delta = compress_context(window, moved, held=held, first_tokens=first, **GIVEN)
    assert len(delta) < 0.7 * len(right)
    restored = decompress_context(held, delta, **TAKEN)
    for name, exact in moved.items():
        if name != "ids":
            assert relative_error(exact, restored[name]) < 0.05


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made.pop("layers.0.values"),
        lambda made: made.update({"layers.0.values": made["layers.0.values"][:, :, 5:]}),
        lambda made: made.update({n: torch.cat([t, t]) for n, t in made.items() if n != "ids"}),
        lambda made: made.update({f"x{n}": made.pop(n) for n in list(made) if n != "ids"}),
    ],
)
def test_what_is_no_pair_of_a_layer_stays_exact(change):
    made = context(0, 64)
    change(made)
    restored = decompress_context({}, compress_context({}, made, **GIVEN), **TAKEN)
    lossy = {
        name
        for name, array in made.items()
        if not np.array_equal(np.asarray(array.tolist()), np.asarray(restored[name].tolist()))
    }
    assert lossy <= {"layers.3.keys", "layers.3.values"}


def test_a_tier_needs_its_own_calibration_and_to_be_accepted():
    made = context(0, 64)
    with pytest.raises(CodecError, match="codec calibrate"):
        compress_context({}, made, codec="balanced")
    delta = compress_context({}, made, **GIVEN)
    with pytest.raises(LossNotAcceptedError, match="balanced"):
        decompress_context({}, delta, calibration=calibration())
    for other in (None, calibration(1)):
        with pytest.raises(DamagedDeltaError, match="calibration"):
            decompress_context({}, delta, accept=["balanced"], calibration=other)
    strange = {name.replace("layers.0", "layers.1"): value for name, value in made.items()}
    with pytest.raises(CodecError, match="lacks"):
        compress_context({}, strange, **GIVEN)
