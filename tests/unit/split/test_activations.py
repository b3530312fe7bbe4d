"""Activations in their forms on the wire."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcp_vllm.split.activations import FORMS, FP8, RAW, Activations, Form
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
    assert len(payload) == form.payload_bytes(tokens)
    return form.decode(payload, tokens, CPU), len(payload)


def total(of: Activations) -> torch.Tensor:
    return of.hidden if of.residual is None else of.hidden + of.residual


@given(st.integers(1, 9), st.integers(4, 70), st.booleans())
def test_raw_is_exact(tokens, width, has_residual):
    given_ = activations(tokens, width, has_residual)
    got, _ = through(Form(RAW, width, torch.bfloat16, has_residual), given_)
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
