"""`split_model` with a stage whose layers are those of transformers: exact tokens, without vLLM."""

from __future__ import annotations

import copy
import gc
import weakref

import msgspec
import pytest
import torch
from stages_for_tests import AddingLayers, PagedLease, RunningStage, running_stage
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache, StoppingCriteria

from mcp_vllm import hf
from mcp_vllm.split.client import StageClient
from mcp_vllm.split.errors import SplitError
from mcp_vllm.split.noise import ActivationNoise
from mcp_vllm.split.wire import KvPlan
from tests.waiting import wait_for

WIDTH = 32
CONFIG = LlamaConfig(
    vocab_size=60, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=5,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
LAYERS = (1, 4)


@pytest.fixture(scope="module")
def whole() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(CONFIG).eval()


def layers_of(model: LlamaForCausalLM) -> AddingLayers:
    """A stage that computes a request's last row from all rows in its blocks."""
    middle = copy.deepcopy(model.model)
    middle.layers = middle.layers[slice(*LAYERS)]
    middle.config = copy.deepcopy(middle.config)
    middle.config.num_hidden_layers = len(middle.layers)
    middle.norm = torch.nn.Identity()

    class Lease(PagedLease):
        PLAN = KvPlan(num_blocks=100, block_tokens=[4, 8], max_model_len=100)
        welcome = msgspec.structs.replace(PagedLease.welcome, width=WIDTH)

        @torch.no_grad()
        def last_row(self, rows: torch.Tensor) -> torch.Tensor:
            return middle(inputs_embeds=rows[None], use_cache=False).last_hidden_state[0, -1]

    return AddingLayers(facts_={}, layers="1:4", client_lease=Lease, dtype=torch.float32)


def split_of(whole: LlamaForCausalLM, client: StageClient) -> LlamaForCausalLM:
    return hf.split_model(copy.deepcopy(whole), LAYERS, client)


def generate(model: LlamaForCausalLM, *prompts: list[int], **settings: object) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(each)) + each for each in prompts])
    common = {"max_new_tokens": 12, "do_sample": False, "attention_mask": (ids != 0).long()}
    return model.generate(ids, **common | settings).tolist()


def test_padded_prompts_beams_and_samples_are_those_of_the_whole_model(whole):
    prompts = [list(range(5, 20)), [7, 8], [40]]
    with running_stage(layers_of(whole)) as stage, StageClient(stage.address) as client:
        split = split_of(whole, client)
        assert generate(split, *prompts) == generate(whole, *prompts)
        assert generate(split, prompts[0], num_beams=3) == generate(whole, prompts[0], num_beams=3)
        torch.manual_seed(0)
        ours = generate(split, [5], do_sample=True, num_return_sequences=3)
        torch.manual_seed(0)
        assert ours == generate(whole, [5], do_sample=True, num_return_sequences=3)


def test_a_chat_goes_on_in_its_cache_and_a_copy_of_it(whole):
    with running_stage(layers_of(whole)) as stage, StageClient(stage.address) as client:
        split = split_of(whole, client)
        cache = DynamicCache(config=split.config)
        first = generate(split, [3, 4, 5], past_key_values=cache)[0]
        copied = copy.deepcopy(cache)
        for question in ([9, 10], [11]):
            asked = [*first, *question]
            used = cache if len(question) == 2 else copied
            assert generate(split, asked, past_key_values=used) == generate(whole, asked)


def test_a_cache_can_be_cut(whole):
    with running_stage(layers_of(whole)) as stage, StageClient(stage.address) as client:
        split, cache = split_of(whole, client), DynamicCache()
        text = torch.tensor([[3, 4, 5, 6, 7]])
        with torch.no_grad():
            split(text, past_key_values=cache)
            cache.crop(-2)
            assert cache.get_seq_length() == 3
            ours = split(torch.tensor([[8, 9]]), past_key_values=cache).logits
            expected = whole(torch.tensor([[3, 4, 5, 8, 9]])).logits[:, 3:]
    assert torch.allclose(ours, expected, atol=1e-5)


class StopAt(StoppingCriteria):
    """Stops a stage when the text has so many tokens."""

    def __init__(self, stage: RunningStage, length: int) -> None:
        self._stage, self._length = stage, length

    def __call__(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        if input_ids.shape[1] == self._length:
            self._stage.server.stop()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_a_stage_that_goes_in_the_middle_of_a_text_costs_no_token(whole):
    prompts = [[5, 6, 7], [8, 9]]
    with running_stage(layers_of(whole)) as first, running_stage(layers_of(whole)) as second:
        client = StageClient([first.address, second.address])
        split = split_of(whole, client)
        ours = generate(split, *prompts, stopping_criteria=[StopAt(first, 9)])
        assert ours == generate(whole, *prompts)
        wait_for("steps at the second stage", lambda: second.count("steps_total") >= 6)
        client.close()


def test_sessions_end_with_their_cache_and_calls_without_one_leave_none(whole):
    backend = layers_of(whole)
    with running_stage(backend) as stage, StageClient(stage.address) as client:
        split, sessions = split_of(whole, client), client.open(LAYERS)
        generate(split, [5, 6], [7, 8])
        gc.collect()
        with torch.no_grad():
            ours = split(torch.tensor([[4, 5]]), use_cache=False).logits
            expected = whole(torch.tensor([[4, 5]])).logits
            assert torch.allclose(ours, expected, atol=1e-5)
            split(torch.tensor([[4]]), use_cache=False)
        assert len(sessions._sessions) == 1
        assert len(backend.leases[0].tables) == 1


def test_the_layers_are_dropped_and_what_is_left_is_a_smaller_model(whole):
    model = copy.deepcopy(whole)
    gone = [weakref.ref(each) for each in model.model.layers[2].parameters()]
    split = hf.split_model(model, "1:4", StageClient("127.0.0.1:9"))
    gc.collect()
    assert [each() for each in gone] == [None] * len(gone)
    assert split.config.num_hidden_layers == len(split.model.layers) == 3
    assert whole.config.num_hidden_layers == 5
    ends = split.model.layers[0], split.model.layers[2]
    assert [each.self_attn.layer_idx for each in ends] == [0, 2]


def test_what_cannot_be_split_or_go_on_is_refused_by_name(whole):
    client = StageClient("127.0.0.1:9")
    for layers in ((0, 2), (2, 5), (3, 2)):
        with pytest.raises(hf.UnsplittableError, match=r"1:4 is the most"):
            hf.split_model(copy.deepcopy(whole), layers, client)
    split = split_of(whole, client)
    static = StaticCache(config=split.config, max_cache_len=16)
    with pytest.raises(SplitError, match="works with a DynamicCache, not StaticCache"):
        split(torch.tensor([[1, 2]]), past_key_values=static)
    filled = DynamicCache()
    with torch.no_grad():
        whole(torch.tensor([[1, 2]]), past_key_values=filled)
    with pytest.raises(SplitError, match="filled by a model that is not split"):
        split(torch.tensor([[3]]), past_key_values=filled)


def test_noise_is_accounted_for_each_text(whole):
    noise = ActivationNoise(clip_norm=1.0, row_epsilon=8.0)
    with running_stage(layers_of(whole)) as stage:
        client = StageClient(stage.address, noise=noise)
        split, cache = split_of(whole, client), DynamicCache()
        with torch.no_grad():
            ours = split(torch.tensor([[3, 4, 5]]), past_key_values=cache).logits
            assert not torch.allclose(ours, whole(torch.tensor([[3, 4, 5]])).logits, atol=1e-2)
        assert cache.layers[1].epsilon() == noise.epsilon(3)
        client.close()
