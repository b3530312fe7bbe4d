"""Activations in their forms on the wire."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcp_vllm.split.activations import FORMS, FP8, PACKED, RAW, Activations, Form
from mcp_vllm.split.errors import WireError

CPU = torch.device("cpu")


def activations(tokens: int, width: int, has_residual: bool = True) -> Activations:
    generator = torch.Generator().manual_seed(tokens * width)
    hidden = torch.randn(tokens, width, generator=generator)
    hidden[:, 3] *= 300  # real ones have a few huge channels
    residual = torch.randn(tokens, width, generator=generator).bfloat16()
    return Activations(hidden.bfloat16(), residual if has_residual else None)


def through(form: Form, given_: Activations) -> tuple[Activations, int]:
    payload = bytearray(b"".join(form.encode(given_)))
    tokens = given_.hidden.shape[0]
    assert len(payload) <= form.payload_bytes(tokens)
    assert len(payload) == form.payload_bytes(tokens) or form.name == PACKED
    return form.decode(payload, tokens, CPU), len(payload)


def total(of: Activations) -> torch.Tensor:
    return of.hidden if of.residual is None else of.hidden + of.residual


@given(st.sampled_from([RAW, PACKED]), st.integers(1, 9), st.integers(4, 70), st.booleans())
def test_raw_and_packed_are_exact(name, tokens, width, has_residual):
    given_ = activations(tokens, width, has_residual)
    got, _ = through(Form(name, width, torch.bfloat16, has_residual), given_)
    assert torch.equal(got.hidden, given_.hidden)
    assert (got.residual is None) == (given_.residual is None)
    if given_.residual is not None:
        assert torch.equal(got.residual, given_.residual)


def test_fold_keeps_the_sum_in_half_the_bytes():
    given_ = activations(7, 64)
    got, size = through(Form("fold", 64, torch.bfloat16, True), given_)
    assert torch.equal(total(got), total(given_))
    assert size == 7 * 64 * 2


def test_fp8_is_close_on_every_token_though_channels_differ_by_hundreds():
    given_ = activations(7, 64)
    got, size = through(Form(FP8, 64, torch.bfloat16, True), given_)
    wanted = total(given_).float()
    error = (total(got).float() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert error.max() < 0.05
    assert size == 7 * (64 + 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_is_smaller_unless_nothing_can_be_saved(dtype):
    form = Form(PACKED, 64, dtype, False)
    rows = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, size = through(form, Activations(rows, None))
    assert torch.equal(got.hidden, rows)
    assert size < 0.95 * form.payload_bytes(32)
    bits = torch.randint(0, 256, (2, 64 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    got, size = through(form, Activations(bits, None))
    assert torch.equal(got.hidden.view(torch.uint8), bits.view(torch.uint8))
    assert size == form.payload_bytes(2)


def test_a_damaged_packed_payload_is_refused():
    form = Form(PACKED, 64, torch.bfloat16, True)
    payload = bytearray(b"".join(form.encode(activations(40, 64))))
    of_other_size = bytearray(b"".join(form.encode(activations(41, 64))))
    for wrong in (payload[:1], payload[4:], of_other_size):
        with pytest.raises(WireError, match="40 tokens"):
            form.decode(wrong, 40, CPU)


def test_tokens_of_zeros_stay_zeros():
    zeros = Activations(torch.zeros(2, 8).bfloat16(), torch.zeros(2, 8).bfloat16())
    for name in FORMS:
        got, _ = through(Form(name, 8, torch.bfloat16, True), zeros)
        assert not total(got).any()


@pytest.mark.parametrize("name", FORMS)
def test_a_payload_of_another_length_is_refused(name):
    form = Form(name, 64, torch.bfloat16, True)
    payload = bytearray(b"".join(form.encode(activations(7, 64))))
    for wrong in (payload[:-1], payload + b"x", bytearray()):
        with pytest.raises(WireError, match="7 tokens"):
            form.decode(wrong, 7, CPU)


def test_rows_that_are_not_contiguous_are_encoded_as_they_read():
    wide = torch.randn(4, 128).bfloat16()
    form = Form(RAW, 64, torch.bfloat16, False)
    got, _ = through(form, Activations(wide[:, 64:], None))
    assert torch.equal(got.hidden, wide[:, 64:])
