"""A transformers model with its middle at a real stage: the tokens of the whole model."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteria

from mcp_vllm import MCPClient, hf
from mcp_vllm.demo.weights import ensure_gemma
from mcp_vllm.split.errors import StageRefused
from tests.integration.split_parts import NEAR_TIE, Stage, stage_of
from tests.tiny_models import BOS_ID, VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# vLLM's kernels and those of transformers round differently: float32 leaves near-ties only.
STAGE_ARGS = ("--block-size", "32", "--max-model-len", "1024", "--dtype", "float32")
TOKENS = 64
LAYERS = {"llama": "1:3", "qwen3": "1:3", "gemma": "4:14"}


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts(rows: int, columns: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Texts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, VOCAB_SIZE, (rows, columns), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(rows):
        tokens[row, : 5 * row], mask[row, : 5 * row] = 0, 0
        tokens[row, 5 * row] = BOS_ID
    return {"input_ids": tokens, "attention_mask": mask}


def generate(model, given: dict[str, torch.Tensor], **settings: object) -> torch.Tensor:
    common = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(**given, **common | settings)


def assert_same_or_near_tie(model, ours: torch.Tensor, reference: torch.Tensor, prompt: int) -> int:
    """The number of rows whose tokens are not the same, each of them after a near-tie."""
    ties = 0
    for row, (a, b) in enumerate(zip(ours, reference, strict=True)):
        if torch.equal(a, b):
            continue
        first = int((a != b).nonzero()[0])
        assert first >= prompt
        with torch.no_grad():
            logits = model(reference[row : row + 1, :first]).logits[0, -1]
        best = logits.topk(2).values
        gap = float(best[0] - best[1])
        assert gap < NEAR_TIE, f"row {row}, token {first - prompt}: gap {gap:.4f}"
        ties += 1
    return ties


@pytest.fixture(scope="module", params=list(LAYERS))
def family(request: pytest.FixtureRequest, tiny_model):
    """A model's name and folder, and a stage of its middle."""
    folder = ensure_gemma() if request.param == "gemma" else tiny_model(request.param)
    name = request.param
    with stage_of(folder, LAYERS[name], "--leases", "2", vllm_args=STAGE_ARGS, name=name) as stage:
        stage.wait_ready()
        yield name, folder, stage


def test_a_batch_of_padded_prompts_gives_the_tokens_of_the_whole_model(family):
    name, folder, stage = family
    whole, given = load(folder), prompts(4, 48)
    reference = generate(whole, given)
    with MCPClient(stage.address) as client:
        split = hf.split_model(load(folder), LAYERS[name], client)
        ours = generate(split, given)
        cache = DynamicCache(config=split.config)
        assert len(cache.layers) == split.config.num_hidden_layers == len(split.model.layers)
        first = generate(split, {"input_ids": reference[:1, :48]}, past_key_values=cache)
        again = generate(split, {"input_ids": first}, past_key_values=cache, max_new_tokens=8)
        assert_same_or_near_tie(whole, again[:, : reference.shape[1]], reference[:1], 48)
        with torch.no_grad():
            difference = split(reference[:1]).logits - whole(reference[:1]).logits
    assert float(difference.abs().max()) < 1e-2
    ties = assert_same_or_near_tie(whole, ours, reference, 48)
    print(f"{name}: 4 rows of {TOKENS} tokens, {ties} near-ties")


def test_beams_are_reordered_at_the_stage_too(family):
    name, folder, stage = family
    given = {"input_ids": prompts(1, 20)["input_ids"]}
    reference = generate(load(folder), given, num_beams=3, max_new_tokens=8)
    with MCPClient(stage.address) as client:
        ours = generate(
            hf.split_model(load(folder), LAYERS[name], client),
            given,
            num_beams=3,
            max_new_tokens=8,
        )
    assert torch.equal(ours, reference)


class KillAt(StoppingCriteria):
    """Kills a stage when a text has so many tokens."""

    def __init__(self, stage: Stage, length: int) -> None:
        self.stage, self.length, self.killed = stage, length, False

    def __call__(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        if input_ids.shape[1] == self.length:
            self.stage.process.kill()
            self.stage.process.wait()
            self.killed = True
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def test_a_stage_that_is_killed_in_the_middle_costs_no_token(tiny_model):
    folder, given = tiny_model("llama"), prompts(4, 48)
    whole = load(folder)
    reference = generate(whole, given)
    with (
        stage_of(folder, LAYERS["llama"], vllm_args=STAGE_ARGS, name="first") as first,
        stage_of(folder, LAYERS["llama"], vllm_args=STAGE_ARGS, name="second") as second,
    ):
        first.wait_ready()
        second.wait_ready()
        with MCPClient(f"{first.address},{second.address}") as client:
            split = hf.split_model(load(folder), LAYERS["llama"], client)
            kill = KillAt(first, 48 + TOKENS // 2)
            ours = generate(split, given, stopping_criteria=[kill])
            assert kill.killed
            assert second.metric("mcp_stage_steps_total") >= TOKENS // 2 - 1
    assert_same_or_near_tie(whole, ours, reference, 48)


def test_threads_with_chats_of_their_own_share_a_model_s_stage(family):
    name, folder, stage = family
    whole = load(folder)
    givens = [prompts(1, 30, seed) for seed in range(3)]
    references = [generate(whole, each) for each in givens]
    with MCPClient(stage.address) as client:
        models = [hf.split_model(load(folder), LAYERS[name], client) for _ in givens]
        results: list[torch.Tensor] = [torch.empty(0)] * len(givens)

        def chat(index: int) -> None:
            results[index] = generate(models[index], givens[index])

        threads = [threading.Thread(target=chat, args=(i,)) for i in range(len(givens))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for ours, reference in zip(results, references, strict=True):
        assert_same_or_near_tie(whole, ours, reference, 30)


def test_other_weights_are_refused_and_the_span_s_memory_is_freed(family, tiny_model):
    name, folder, stage = family
    model = load(tiny_model("llama", 7) if name == "llama" else folder)
    gone = [weakref.ref(each) for each in model.model.layers[2].parameters()]
    with MCPClient(stage.address) as client:
        split = hf.split_model(model, (1, 3) if name != "gemma" else (4, 14), client)
        gc.collect()
        if name != "gemma":
            assert not any(each() for each in gone)
        if name == "llama":
            with pytest.raises(StageRefused, match=r"model\.weights"):
                split(torch.tensor([[BOS_ID, 20, 30]]))
