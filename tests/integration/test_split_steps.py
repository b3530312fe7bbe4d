"""Scheduler outputs and KV cache specs on their way to a stage; no engine is started."""

import msgspec
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from mcp_vllm.split import wire
from mcp_vllm.split.activations import Activations
from mcp_vllm.split.engine.kv_specs import decode_group, decode_spec, encode_group, encode_spec
from mcp_vllm.split.engine.layers import LayerCall, LayersUnsupported, check_span
from mcp_vllm.split.engine.steps import Limits, StepDecoder, StepEncoder
from mcp_vllm.split.errors import StageRefused, WireError

PROMPT = [301, 302, 303, 304, 305]
LIMITS = Limits(max_tokens=64, max_requests=4, max_model_len=128, num_blocks=32, block_sizes=(16,))


def new(req_id: str, blocks: list[int], computed: int = 0) -> NewRequestData:
    sampling = SamplingParams(temperature=0.8, seed=77_777, stop=["harbour"])
    return NewRequestData(req_id, PROMPT, [], sampling, None, (blocks,), computed, None)


def cached(req_id: str, computed: int, blocks: list[int] | None, resumed: bool = False):
    return CachedRequestData(
        req_ids=[req_id],
        resumed_req_ids={req_id} if resumed else set(),
        new_token_ids=[[299]],
        all_token_ids={req_id: [*PROMPT, 299, 298]},
        new_block_ids=[None if blocks is None else (blocks,)],
        num_computed_tokens=[computed],
        num_output_tokens=[2],
    )


def output(
    new_reqs: list[NewRequestData],
    counts: dict[str, int],
    old: CachedRequestData | None = None,
    finished: set[str] = frozenset(),
    **more: object,
) -> SchedulerOutput:
    return SchedulerOutput(
        scheduled_new_reqs=new_reqs,
        scheduled_cached_reqs=old or CachedRequestData.make_empty(),
        num_scheduled_tokens=counts,
        total_num_scheduled_tokens=sum(counts.values()),
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids=set(finished),
        free_encoder_mm_hashes=[],
        **more,
    )


def test_of_a_new_request_only_lengths_and_blocks_leave():
    step = StepEncoder().encode(output([new("chatcmpl-secret", [3, 4])], {"chatcmpl-secret": 5}))
    encoded = msgspec.msgpack.encode(step)
    assert step.new == [wire.NewRequest(1, 5, 0, [[3, 4]])]
    assert step.scheduled == [(1, 5)]
    for secret in (b"secret", b"harbour", *(msgspec.msgpack.encode(each) for each in PROMPT)):
        assert secret not in encoded


def test_the_stage_gets_the_same_step_under_aliases():
    encoder, decoder = StepEncoder(), StepDecoder(LIMITS)
    first = output([new("a", [1]), new("b", [2], computed=3)], {"a": 5, "b": 2})
    got = decoder.decode(encoder.encode(first))
    assert [each.req_id for each in got.scheduled_new_reqs] == ["1", "2"]
    assert got.num_scheduled_tokens == {"1": 5, "2": 2}
    assert got.scheduled_new_reqs[1].num_computed_tokens == 3
    assert got.scheduled_new_reqs[0].prompt_token_ids == [0] * 5
    second = output(
        [], {"b": 1}, cached("b", 5, [7]), {"a"},
        new_block_ids_to_zero=[7], kv_cache_block_copies=[KVCacheBlockCopy(2, 7)],
    )  # fmt: skip
    got = decoder.decode(encoder.encode(second))
    assert got.finished_req_ids == {"1"}
    assert got.scheduled_cached_reqs.req_ids == ["2"]
    assert got.scheduled_cached_reqs.new_block_ids == [([7],)]
    assert got.scheduled_cached_reqs.num_computed_tokens == [5]
    assert got.new_block_ids_to_zero == [7]
    assert got.kv_cache_block_copies == [KVCacheBlockCopy(2, 7)]
    assert encoder.order(["b"]) == [2]


def test_a_resumed_request_is_a_new_one_to_the_stage():
    encoder, decoder = StepEncoder(), StepDecoder(LIMITS)
    decoder.decode(encoder.encode(output([new("a", [1])], {"a": 5})))
    resumed = output([], {"a": 7}, cached("a", 0, [9], resumed=True))
    step = encoder.encode(resumed)
    assert step.finished == [1]
    assert step.new == [wire.NewRequest(2, 5, 0, [[9]])]
    assert step.continued == []
    decoder.decode(step)
    # A stage that takes over has seen neither.
    assert StepEncoder().encode(resumed).finished == []


@pytest.mark.parametrize(
    "spec",
    [
        FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16),
        SlidingWindowSpec(
            block_size=32, num_kv_heads=1, head_size=256, dtype=torch.float16, sliding_window=512
        ),
        MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16),
    ],
)
def test_a_kv_cache_spec_comes_back_equal(spec):
    packed = msgspec.msgpack.encode(encode_spec(spec))
    assert decode_spec(msgspec.msgpack.decode(packed, type=wire.KvSpec)) == spec


def test_a_group_of_one_type_of_layers_comes_back_equal():
    specs = {
        f"layers.{i}": FullAttentionSpec(
            block_size=16, num_kv_heads=i + 1, head_size=64, dtype=torch.bfloat16
        )
        for i in range(2)
    }
    whole = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=specs)
    for spec, names in ((whole, list(specs)), (specs["layers.0"], [])):
        again = decode_group(encode_group(KVCacheGroupSpec(names, spec)))
        assert again.layer_names == names
        assert again.kv_cache_spec == spec


@pytest.mark.parametrize(
    "encoded",
    [
        ("MambaSpec", {}),
        ("os.system", {"block_size": 16}),
        ("FullAttentionSpec", {"block_size": 16, "evil": 1}),
        ("FullAttentionSpec", {"block_size": 16, "dtype": "complex64"}),
        ("FullAttentionSpec", {"num_kv_heads": 1}),
    ],
)
def test_a_spec_that_is_not_on_the_list_is_refused(encoded):
    with pytest.raises(WireError):
        decode_spec(encoded)


def test_recurrent_layers_are_refused_by_name():
    spec = MambaSpec(block_size=16, shapes=((1, 2),), dtypes=(torch.float32,))
    with pytest.raises(StageRefused, match="MambaSpec cannot be split"):
        encode_spec(spec)


class Usual(torch.nn.Module):
    def forward(self, positions, hidden_states, residual):
        return hidden_states + 1, residual


class WithImages(torch.nn.Module):
    def forward(self, positions, hidden_states, residual, image_embeds):
        return hidden_states, residual


class Encoder(torch.nn.Module):
    def forward(self, x):
        return x


def test_a_usual_layer_is_called_by_name_or_by_position():
    call = LayerCall.of(Usual())
    assert call.has_residual
    assert call.activations((0, "h", "r"), {}).residual == "r"
    assert (
        call.activations((), {"positions": 0, "hidden_states": "h", "residual": None}).hidden == "h"
    )


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((0, "h", "r"), {}),
        ((0, "h"), {"residual": "r"}),
        ((), {"residual": "r", "positions": 0, "hidden_states": "h"}),
    ],
)
def test_other_activations_take_the_place_of_what_a_call_gives(args, kwargs):
    call = LayerCall.of(Usual())
    by_place, by_name = call.of_others(args, kwargs, Activations("H", "R"))
    assert call.activations(by_place, by_name) == Activations("H", "R")
    assert len(by_place) == len(args)
    assert by_name.keys() == kwargs.keys()
    assert (by_place[0] if by_place else by_name["positions"]) == 0


@pytest.mark.parametrize("layer", [WithImages(), Encoder()])
def test_an_unusual_layer_is_refused_by_name(layer):
    with pytest.raises(LayersUnsupported, match=f"{type(layer).__name__} cannot be split"):
        LayerCall.of(layer)


@pytest.mark.parametrize("span", [(0, 3), (1, 4), (3, 3), (2, 9)])
def test_the_first_and_the_last_layer_stay(span):
    with pytest.raises(LayersUnsupported, match="1:3 is the most"):
        check_span(*span, 4)
