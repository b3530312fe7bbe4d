"""Deltas: what changed and nothing else, for the right base only, whatever is damaged."""

import random
import struct
import subprocess
import sys
from itertools import pairwise

import msgspec
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_vllm.codec import CodecError, lossless_names
from mcp_vllm.errors import McpError
from mcp_vllm.session.delta import (
    ArrayError,
    DamagedDeltaError,
    DeltaError,
    LossNotAcceptedError,
    WrongBaseError,
    compress_context,
    decompress_context,
    frames,
    wire,
)

LOSSLESS = lossless_names()
TORCH_TYPES = ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
NUMPY_TYPES = ["float16", "float32", "float64", "bool", "uint8", "int16", "uint32", "int64"]


def bits(array) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        # A tensor of one element may have any stride, which view() does not take.
        flat = torch.empty(array.numel(), dtype=array.dtype).copy_(array.reshape(-1))
        return flat.view(torch.uint8).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_same(context, other) -> None:
    assert context.keys() == other.keys()
    for name, array in context.items():
        assert type(array) is type(other[name])
        assert (array.dtype, array.shape) == (other[name].dtype, other[name].shape)
        assert (bits(array) == bits(other[name])).all(), name


def kv(num_tokens: int, seed: int = 0, heads: int = 2) -> torch.Tensor:
    """bf16 [1, head, token, channel]; longer ones begin with shorter ones of the same seed."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(1, heads, 1, 64, generator=generator) for _ in range(num_tokens)]
    return torch.cat(tokens, dim=2).bfloat16()


def delta_size(old, new) -> int:
    delta = compress_context(old, new)
    assert_same(decompress_context(old, delta), new)
    return len(delta)


def raw_tokens(num_tokens: int) -> int:
    return num_tokens * 2 * 64 * 2


@pytest.mark.parametrize("codec", LOSSLESS)
def test_additions_changes_removals_and_growth_arrive(codec):
    old = {"k": kv(40), "gone": np.arange(5), "same": kv(9, 1), "type": np.zeros(3, np.float32)}
    new = {"k": kv(47), "same": kv(9, 1), "type": np.zeros(3, np.float64), "new": np.array(7)}
    assert_same(decompress_context(old, compress_context(old, new, codec=codec)), new)


def test_an_empty_base_gives_a_full_export():
    new = {"k": kv(40), "empty": np.zeros((0, 3), np.int8)}
    assert_same(decompress_context({}, compress_context({}, new)), new)
    assert_same(decompress_context({}, compress_context({}, {})), {})
    assert_same(decompress_context(new, compress_context(new, {})), {})


def test_only_new_tokens_are_coded():
    assert delta_size({"k": kv(500)}, {"k": kv(510)}) < raw_tokens(10) + 200


def test_of_a_window_that_moved_only_new_tokens_are_coded():
    chat = kv(530)
    assert delta_size({"k": chat[:, :, :511]}, {"k": chat[:, :, 19:]}) < raw_tokens(19) + 200


def test_after_a_replaced_answer_the_common_prefix_is_not_coded():
    chat = kv(300)
    other = torch.cat([chat[:, :, :280], kv(15, seed=1)], dim=2)
    assert delta_size({"k": chat}, {"k": other}) < raw_tokens(15) + 200


def test_a_cropped_array_costs_next_to_nothing():
    assert delta_size({"k": kv(300)}, {"k": kv(200)}) < 200


def test_growth_along_any_axis_is_found():
    whole = np.random.default_rng(0).normal(size=(30, 30, 30)).astype(np.float32)
    for axis in range(3):
        old = {"a": np.take(whole, range(29), axis)}
        assert delta_size(old, {"a": whole}) < 900 * 4 + 200


def test_an_unchanged_array_costs_a_few_bytes_and_is_the_same_object():
    few, many = {"a": kv(64)}, {f"a{number}": kv(64) for number in range(101)}
    size = len(compress_context(many, many))
    assert size - len(compress_context(few, few)) < 100 * 16
    assert decompress_context(few, compress_context(few, few))["a"] is few["a"]


def test_neither_input_nor_base_is_modified():
    old, new = {"k": kv(20)}, {"k": kv(30)}
    copies = old["k"].clone(), new["k"].clone()
    result = decompress_context(old, compress_context(old, new))
    result["k"].zero_()
    assert torch.equal(old["k"], copies[0])
    assert torch.equal(new["k"], copies[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": kv(40, seed=1), "v": kv(40)}, "^k differs"),
        ({"k": kv(41), "v": kv(40)}, "^k differs"),
        ({"k": kv(40).float(), "v": kv(40)}, "^k differs"),
        ({"v": kv(40)}, "k, which is missing"),
        ({"k": kv(40), "v": kv(40), "w": kv(1)}, "without w"),
    ],
)
def test_a_wrong_base_is_refused_by_the_array_that_differs(wrong, message):
    old = {"k": kv(40), "v": kv(40)}
    delta = compress_context(old, {"k": kv(45), "v": kv(40)})
    with pytest.raises(WrongBaseError, match=message):
        decompress_context(wrong, delta)


def test_chained_deltas_follow_a_chat():
    contexts = [{}, *({"k": kv(length), "ids": np.arange(length)} for length in (100, 120, 170))]
    peer = {}
    for old, new in pairwise(contexts):
        peer = decompress_context(peer, compress_context(old, new))
    assert_same(peer, contexts[-1])


@pytest.mark.parametrize("dtype", TORCH_TYPES)
def test_every_float_keeps_its_bits(dtype):
    pattern = torch.arange(1 << 12, dtype=torch.int32).mul(0x9E3779B1).view(torch.uint8)
    floats = pattern.view(getattr(torch, dtype)).reshape(4, -1)
    assert_same(decompress_context({}, compress_context({}, {"a": floats})), {"a": floats})


class Strange:
    dtype = "float32"


@pytest.mark.parametrize(
    "context",
    [
        {"a": Strange()},
        {"a": [1.0]},
        {"a": np.array(["text"])},
        {"a": np.array([1 + 2j])},
        {"a": np.zeros(3, ">f4")},
        {"a": torch.zeros(3, device="meta")},
        {"a": torch.eye(3).to_sparse()},
        {"a" * 300: np.zeros(3)},
        {7: np.zeros(3)},
    ],
)
def test_what_is_no_array_is_refused_by_name(context):
    with pytest.raises(ArrayError):
        compress_context({}, context)


def test_an_unknown_codec_is_refused():
    with pytest.raises(CodecError, match="did you mean"):
        compress_context({}, {}, codec="losless")


def test_what_the_receiver_holds_must_have_the_shape_of_the_base():
    with pytest.raises(DeltaError, match="k: `held`"):
        compress_context({"k": kv(3)}, {"k": kv(4)}, held={"k": kv(2)})


def test_what_the_receiver_holds_is_kept_and_checked_in_place_of_the_base():
    old, new, held = {"k": kv(40)}, {"k": kv(44)}, {"k": kv(40) + 1}
    delta = compress_context(old, new, held=held, codec=LOSSLESS[0])
    with pytest.raises(WrongBaseError):
        decompress_context(old, delta)


def test_loss_is_small_is_marked_and_does_not_add_up_over_turns():
    contexts = [{}, *({"k": kv(length), "ids": np.arange(length)} for length in (30, 60, 75))]
    held: dict = {}
    for old, new in pairwise(contexts):
        delta = compress_context(old, new, held=held, codec="near-lossless")
        before = held
        held = decompress_context(held, delta, accept=["near-lossless"])
        if before:
            tokens = before["k"].shape[2]
            assert torch.equal(held["k"][:, :, :tokens], before["k"])
    exact, given = contexts[-1]["k"].float(), held["k"].float()
    assert (held["ids"] == contexts[-1]["ids"]).all()
    assert torch.equal(exact[:, :, :16], given[:, :, :16])
    bound = exact.abs().amax(dim=-1, keepdim=True) / 127
    assert ((exact - given).abs() <= bound + exact.abs() / 256).all()
    assert not torch.equal(exact, given)


def test_a_lossy_delta_is_refused_where_loss_was_not_accepted():
    base, new = {"k": kv(40)}, {"k": kv(80)}
    delta = compress_context(base, new, codec="near-lossless")
    for accept in ([], ["balanced"]):
        with pytest.raises(LossNotAcceptedError, match="near-lossless"):
            decompress_context(base, delta, accept=accept)


@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 70), st.integers(1, 40)),
        min_size=1,
        max_size=4,
    ),
    kept=st.integers(0, 40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int32]),
    frame_bytes=st.sampled_from([500, 4000, 1 << 22]),
)
def test_any_arrays_survive_a_lossy_delta_in_type_and_shape(shapes, kept, dtype, frame_bytes):
    generator = torch.Generator().manual_seed(0)
    new = {
        f"k{n}": torch.randn(shape, generator=generator).mul(50).to(dtype)
        for n, shape in enumerate(shapes)
    }
    old = {name: tensor[:, :, :kept].clone() for name, tensor in new.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "FRAME_BYTES", frame_bytes)
        delta = compress_context(old, new, codec="near-lossless")
        restored = decompress_context(old, delta, accept=["near-lossless"])
    for name, tensor in new.items():
        assert restored[name].shape == tensor.shape
        assert restored[name].dtype == dtype
        if dtype == torch.int32:
            assert torch.equal(restored[name], tensor)
        else:
            error = (restored[name].double() - tensor.double()).abs()
            largest = tensor.double().abs().max() if tensor.numel() else 0
            assert (error <= largest / 100).all()


def test_a_codec_that_needs_a_calibration_is_refused():
    with pytest.raises(CodecError, match="calibration"):
        compress_context({}, {"k": kv(40)}, codec="balanced")


# Damage.


def small_delta() -> tuple[dict, bytes, dict]:
    old = {"k": kv(4, heads=1), "ids": np.arange(4), "x": np.zeros(2)}
    new = {"k": kv(7, heads=1), "ids": np.arange(9)}
    return old, compress_context(old, new, codec="zstd"), new


def reseal(delta: bytearray) -> bytes:
    end = 24 + struct.unpack_from("<I", delta, 16)[0]
    delta[end : end + 8] = xxhash.xxh3_64_digest(delta[:end])
    return bytes(delta)


def with_metadata(delta: bytes, metadata: object) -> bytes:
    """The delta with other metadata, checksum and sizes made right."""
    frames = delta[24 + struct.unpack_from("<I", delta, 16)[0] + 8 :]
    body = msgspec.msgpack.encode(metadata)
    changed = bytearray(delta[:24]) + body + bytes(8) + frames
    struct.pack_into("<Q", changed, 8, len(changed))
    struct.pack_into("<I", changed, 16, len(body))
    return reseal(changed)


def test_every_truncation_and_every_extension_is_refused():
    old, delta, _ = small_delta()
    for size in range(len(delta)):
        with pytest.raises(DamagedDeltaError):
            decompress_context(old, delta[:size])
    with pytest.raises(DamagedDeltaError):
        decompress_context(old, delta + b"\x00")


def test_every_flipped_bit_is_detected_or_harmless():
    """Harmless: zstandard has bits without a meaning."""
    old, delta, new = small_delta()
    harmless = 0
    for bit in range(8 * len(delta)):
        damaged = bytearray(delta)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert_same(decompress_context(old, damaged), new)
        except DamagedDeltaError:
            continue
        harmless += 1
    assert harmless < 16


def test_hostile_metadata_raises_nothing_else():
    old, delta, new = small_delta()
    size = struct.unpack_from("<I", delta, 16)[0]
    rng = random.Random(0)
    for _ in range(4000):
        damaged = bytearray(delta)
        for _ in range(rng.randrange(1, 4)):
            damaged[24 + rng.randrange(size)] = rng.randrange(256)
        try:
            assert_same(decompress_context(old, reseal(damaged), max_bytes=1 << 16), new)
        except DeltaError:
            continue


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [1 << 40, 1 << 40]},
        {"shape": [0, 1 << 47, 1 << 47]},
        {"shape": [1] * 17},
        {"dtype": "complex128"},
        {"dtype": "object"},
        {"library": "pickle"},
        {"axis": 3, "start": 0, "kept": 1},
        {"axis": 0, "start": 0, "kept": 10},
        {"axis": 0, "start": 3, "kept": 2},
        {"name": "new", "axis": 0, "start": 0, "kept": 2},
        {"name": "k"},
        {"digest": b"short"},
    ],
)
def test_entries_that_contradict_are_refused(change):
    old, delta, _ = small_delta()
    metadata, _, _ = wire.unpack(memoryview(delta), max_bytes=1 << 20)
    plain = msgspec.to_builtins(metadata, builtin_types=(bytes,))
    (entry,) = (each for each in plain[2] if each[0] == "ids")
    for field, value in change.items():
        entry[wire.ChangedArray.__struct_fields__.index(field)] = value
    with pytest.raises(DamagedDeltaError):
        decompress_context(old, with_metadata(delta, plain), max_bytes=1 << 20)


def test_a_claim_beyond_the_bound_is_refused_before_anything_is_allocated():
    delta = compress_context({}, {"zeros": np.zeros(1 << 22, np.uint8)})
    assert len(delta) < 4096
    with pytest.raises(DamagedDeltaError, match="more than the 1048576 bytes"):
        decompress_context({}, delta, max_bytes=1 << 20)


def test_frames_swapped_between_deltas_are_refused():
    old, new, other = {}, {"k": kv(30)}, {"k": kv(30, seed=1)}
    first, second = (compress_context(old, each, codec="raw") for each in (new, other))
    assert len(first) == len(second)
    body = 24 + struct.unpack_from("<I", first, 16)[0] + 8
    with pytest.raises(DamagedDeltaError, match="does not match its checksum"):
        decompress_context(old, first[:body] + second[body:])


def test_arrays_larger_than_a_frame_arrive(monkeypatch):
    monkeypatch.setattr(frames, "FRAME_BYTES", 1000)
    old, new = {"a": kv(20)}, {"a": kv(33), "b": kv(10, 2), "c": np.arange(999)}
    assert_same(decompress_context(old, compress_context(old, new)), new)


def test_importing_the_package_loads_neither_torch_nor_the_compiler():
    check = (
        "import sys, mcp_vllm.session.delta;"
        "print([m for m in ('torch', 'numba', 'vllm', 'aiohttp') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_all_errors_share_the_projects_root():
    assert issubclass(DeltaError, McpError)


# Properties.

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray | torch.Tensor:
    """Any type, shape and strides; random bits, or few values."""
    shape = draw(shapes)
    library, dtype = draw(
        st.sampled_from(
            [("numpy", each) for each in NUMPY_TYPES] + [("torch", each) for each in TORCH_TYPES]
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 5)))
    if library == "torch":
        width = getattr(torch, dtype).itemsize
        content = np.frombuffer(rng.bytes(int(np.prod(shape)) * width), f"i{width}")
        signed = torch.from_numpy(content.reshape(shape).copy())
        array = signed.view(getattr(torch, dtype))
    else:
        top = 2 if dtype == "bool" else draw(st.sampled_from([2, 100]))
        array = rng.integers(0, top, shape).astype(dtype)
    if array.ndim > 1 and draw(st.booleans()):
        array = array.swapaxes(0, -1)
    if array.ndim and draw(st.booleans()):
        array = array[::2]
    return array


contexts = st.dictionaries(st.sampled_from("abcde"), arrays(), max_size=4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(old=contexts, new=contexts)
def test_any_context_becomes_any_other(old, new):
    assert_same(decompress_context(old, compress_context(old, new, codec="zstd")), new)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    array=arrays(),
    axis=st.integers(0, 3),
    cuts=st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)),
)
def test_any_overlap_is_kept(array, axis, cuts):
    if array.ndim == 0:
        return
    axis, (dropped, middle, length) = axis % array.ndim, cuts
    rows = np.arange(array.shape[axis])

    def take(chosen):
        if isinstance(array, torch.Tensor):
            integers = array.view(getattr(torch, f"int{8 * array.itemsize}"))
            return integers.index_select(axis, torch.from_numpy(chosen)).view(array.dtype)
        return np.take(array, chosen, axis)

    old, new = {"a": take(rows[:middle])}, {"a": take(rows[dropped:length])}
    assert_same(decompress_context(old, compress_context(old, new, codec="zstd")), new)
