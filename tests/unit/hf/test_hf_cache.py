"""Caches of transformers models leave and come back bit for bit, and the chat goes on unchanged."""

import os
import stat
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DeepseekV2Config,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    StaticCache,
)

from mcp_vllm import hf
from mcp_vllm.codec import CodecError
from mcp_vllm.codec.calibration import Calibration
from mcp_vllm.codec.fit import fit_band, tail_of
from mcp_vllm.codec.planes import Source
from mcp_vllm.hf import library
from mcp_vllm.session.delta import DamagedDeltaError, LossNotAcceptedError, WrongBaseError

WINDOW = 32
PROMPT_TOKENS = 40
NUM_TURNS = 2
MAX_TOKENS = 160


# Wide enough for tokens that depend on the context, small enough for dozens of chats.
_SIZE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def gemma3_config() -> PreTrainedConfig:
    """Sliding windows in two of three layers, as in the model of the demo."""
    return Gemma3TextConfig(
        num_hidden_layers=3,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **_SIZE,
    )


def llama_config() -> PreTrainedConfig:
    return LlamaConfig(num_hidden_layers=4, num_key_value_heads=2, head_dim=32, **_SIZE)


def deepseek_v2_config() -> PreTrainedConfig:
    """Keys and values of different widths."""
    return DeepseekV2Config(
        num_hidden_layers=2,
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        first_k_dense_replace=2,
        **_SIZE,
    )


CONFIGS = {"gemma3": gemma3_config, "llama": llama_config, "deepseek_v2": deepseek_v2_config}
CACHES: dict[str, Callable[[PreTrainedConfig], Cache]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "every_token": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=MAX_TOKENS),
}


def make_model(family: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more by a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return {family: make_model(family) for family in CONFIGS}


def random_tokens(num_tokens: int, seed: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (batch, num_tokens), generator=generator)


def answer(model: torch.nn.Module, cache: Cache, token_ids: torch.Tensor, num: int = 4):
    """The chat's tokens with a greedy answer behind."""
    return model.generate(
        token_ids,
        past_key_values=cache,
        max_new_tokens=num,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


def chat_of(model, make_cache, num_tokens: int = PROMPT_TOKENS, batch: int = 1) -> hf.CachedChat:
    cache = make_cache(model.config)
    return hf.CachedChat(cache, answer(model, cache, random_tokens(num_tokens, 0, batch)))


def assert_bit_identical(ours: Cache, theirs: Cache) -> None:
    assert type(ours) is type(theirs)
    assert len(ours.layers) == len(theirs.layers)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert type(mine) is type(other)
        assert int(mine.get_seq_length()) == int(other.get_seq_length())
        for a, b in ((mine.keys, other.keys), (mine.values, other.values)):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("cache_kind", CACHES)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_chat_that_moves_each_turn_goes_on_with_the_same_tokens(models, family, cache_kind):
    model = models[family]
    chat, base, peer = chat_of(model, CACHES[cache_kind]), None, None
    for turn in range(NUM_TURNS):
        data = hf.export_cache(*chat[:1], model, token_ids=chat.token_ids, base=base)
        peer = hf.import_cache(data, model, base=peer)
        assert_bit_identical(chat.cache, peer.cache)
        assert torch.equal(chat.token_ids, peer.token_ids)
        base = hf.snapshot(chat.cache, chat.token_ids)
        question = torch.cat([chat.token_ids, random_tokens(5, turn)], dim=1)
        # The peer answers on a copy: what it has must remain the next delta's base.
        other = hf.import_cache(hf.export_cache(peer.cache, model), model)
        tokens = answer(model, chat.cache, question)
        assert torch.equal(tokens, answer(model, other.cache, question))
        chat = hf.CachedChat(chat.cache, tokens)


@pytest.mark.parametrize("cache_kind", CACHES)
def test_only_new_tokens_travel_also_when_the_window_has_moved(models, cache_kind):
    model = models["gemma3"]
    chat = chat_of(model, CACHES[cache_kind], 90)
    base = hf.snapshot(chat.cache)
    answer(model, chat.cache, chat.token_ids, 8)
    delta = hf.export_cache(chat.cache, model, base=base, codec="raw")
    new_bytes = 8 * 3 * 2 * 64 * 2
    assert new_bytes < len(delta) < new_bytes + 2500


def test_a_batch_of_chats_moves(models):
    model = models["gemma3"]
    chat = chat_of(model, CACHES["dynamic"], batch=3)
    assert_bit_identical(
        chat.cache, hf.import_cache(hf.export_cache(chat.cache, model), model).cache
    )


@pytest.mark.parametrize("cache_kind", CACHES)
def test_a_cache_that_saw_nothing_moves(models, cache_kind):
    model = models["llama"]
    cache = CACHES[cache_kind](model.config)
    chat = hf.import_cache(hf.export_cache(cache, model), model)
    tokens = random_tokens(20, 0)
    assert torch.equal(answer(model, cache, tokens), answer(model, chat.cache, tokens))
    assert chat.token_ids is None


def test_a_saved_chat_is_loaded_with_its_tokens(models, tmp_path):
    model, path = models["gemma3"], tmp_path / "chat.mcp"
    chat = chat_of(model, CACHES["dynamic"])
    size = hf.save_cache(path, chat.cache, model, token_ids=chat.token_ids)
    assert size == path.stat().st_size
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = hf.load_cache(path, model)
    assert_bit_identical(chat.cache, loaded.cache)
    assert torch.equal(chat.token_ids, loaded.token_ids)


@pytest.mark.parametrize("cache_kind", CACHES)
def test_a_lossy_chat_moves_turn_by_turn_and_is_refused_unless_accepted(models, cache_kind):
    model = models["gemma3"]
    chat = chat_of(model, CACHES[cache_kind])
    given = {"token_ids": chat.token_ids, "codec": "near-lossless"}
    export = hf.export_cache(chat.cache, model, **given)
    with pytest.raises(LossNotAcceptedError, match="near-lossless"):
        hf.import_cache(export, model)
    held = hf.import_cache(export, model, accept=["near-lossless"])
    base = hf.snapshot(chat.cache, chat.token_ids)
    longer = torch.cat([chat.token_ids, chat.token_ids], dim=1)
    model(longer[:, chat.cache.get_seq_length() :], past_key_values=chat.cache, use_cache=True)
    export = hf.export_cache(chat.cache, model, base=base, held=held, codec="near-lossless")
    peer = hf.import_cache(export, model, base=held, accept=["near-lossless"])
    for ours, theirs in zip(chat.cache.layers, peer.cache.layers, strict=True):
        keys, theirs_keys = ours.keys.float(), theirs.keys.float()
        assert keys.shape == theirs_keys.shape
        bound = keys.abs().amax(dim=-1, keepdim=True) / 100
        assert ((keys - theirs_keys).abs() <= bound).all()


def calibration_of(cache) -> Calibration:
    """Bands of the layers' own values, all channels of equal weight."""
    bands, coefficients = [], []
    for layer, of in enumerate(cache.layers):
        both = [each[0].transpose(0, 1).flatten(1).float().numpy() for each in (of.keys, of.values)]
        heads = range(of.keys.shape[1])
        sources = tuple(Source(layer, kind, head) for kind in ("k", "v") for head in heads)
        values = np.concatenate(both, axis=1)
        gradients = np.random.default_rng(layer).normal(size=values.shape).astype(np.float32)
        none = np.empty(0, np.float32)
        band, kept = fit_band(sources, values, gradients, none, np.arange(len(values)))
        bands.append(band)
        coefficients.append(kept)
    return Calibration("made up", tuple(bands), tail_of(coefficients))


@pytest.mark.parametrize("cache_kind", CACHES)
def test_a_chat_moves_by_a_calibrated_tier(models, cache_kind):
    model = models["gemma3"]
    chat = chat_of(model, CACHES[cache_kind])
    calibration = calibration_of(chat.cache)
    export = hf.export_cache(chat.cache, model, codec="balanced", calibration=calibration)
    held = hf.import_cache(export, model, accept=["balanced"], calibration=calibration)
    errors = [
        (ours.keys.float() - theirs.keys.float()).norm() / ours.keys.float().norm()
        for ours, theirs in zip(chat.cache.layers, held.cache.layers, strict=True)
    ]
    assert 0 < max(errors) < 0.05


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(models, tmp_path, monkeypatch):
    model, path = models["llama"], tmp_path / "chat.mcp"
    chat = chat_of(model, CACHES["dynamic"])
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        hf.save_cache(path, chat.cache, model)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_snapshot_stays_when_a_static_cache_goes_on(models):
    model = models["gemma3"]
    chat = chat_of(model, CACHES["static"])
    before = hf.export_cache(chat.cache, model)
    kept = hf.snapshot(chat.cache)
    answer(model, chat.cache, chat.token_ids)
    assert hf.export_cache(kept.cache, model) == before


# Refusals.


def test_a_cache_of_another_model_is_refused_by_the_field_that_differs(models):
    data = hf.export_cache(chat_of(models["llama"], CACHES["dynamic"]).cache, models["llama"])
    with pytest.raises(hf.OtherModelError, match="model_type: ours is '\"gemma3_text\"'"):
        hf.import_cache(data, models["gemma3"])
    fewer = llama_config()
    fewer.num_hidden_layers = 3
    with pytest.raises(hf.OtherModelError, match="num_hidden_layers: ours is '3', theirs is '4'"):
        hf.import_cache(data, fewer)


def test_another_dtype_and_other_weights_are_refused(models):
    data = hf.export_cache(chat_of(models["llama"], CACHES["dynamic"]).cache, models["llama"])
    with pytest.raises(hf.OtherModelError, match="weights"):
        hf.import_cache(data, make_model("llama", seed=1))
    with pytest.raises(hf.OtherModelError, match="dtype"):
        hf.import_cache(data, make_model("llama").float())


def test_a_configuration_is_enough_to_import(models):
    chat = chat_of(models["llama"], CACHES["dynamic"])
    data = hf.export_cache(chat.cache, models["llama"])
    assert_bit_identical(chat.cache, hf.import_cache(data, llama_config()).cache)


def test_a_base_that_went_on_is_refused(models):
    model = models["llama"]
    chat = chat_of(model, CACHES["dynamic"])
    base = hf.snapshot(chat.cache)
    peer = hf.import_cache(hf.export_cache(chat.cache, model), model)
    tokens = answer(model, chat.cache, chat.token_ids)
    delta = hf.export_cache(chat.cache, model, base=base)
    answer(model, peer.cache, tokens)
    with pytest.raises(WrongBaseError, match=r"layers\.0\.keys"):
        hf.import_cache(delta, model, base=peer)


def test_unknown_caches_are_refused_by_name(models):
    class OwnCache(DynamicCache):
        pass

    cache = OwnCache(config=llama_config())
    with pytest.raises(hf.UnsupportedCacheError, match="OwnCache"):
        hf.export_cache(cache, models["llama"])


def test_a_cache_that_records_the_past_is_refused(models):
    cache = DynamicCache(config=gemma3_config())
    cache.activate_past_recording()
    with pytest.raises(hf.UnsupportedCacheError, match="assisted decoding"):
        hf.export_cache(cache, models["gemma3"])


def test_an_unknown_codec_is_refused(models):
    with pytest.raises(CodecError):
        hf.export_cache(DynamicCache(), models["llama"], codec="none")


@pytest.mark.parametrize("version", ["4.57.6", "5.15.1", "6.0.0"])
def test_a_release_outside_the_range_is_refused(monkeypatch, version):
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(hf.LibraryError, match=f"transformers {version} is outside"):
        library.cache_utils()


def test_damage_is_detected(models):
    model = models["gemma3"]
    chat = chat_of(model, CACHES["dynamic"], 8)
    data = hf.export_cache(chat.cache, model, token_ids=chat.token_ids)
    damage = hf.DamagedCacheError, DamagedDeltaError
    for size in range(0, len(data), len(data) // 40):
        with pytest.raises(damage):
            hf.import_cache(data[:size], model)
    for index in range(0, len(data), len(data) // 200):
        changed = bytearray(data)
        changed[index] ^= 0x10
        try:
            assert_bit_identical(hf.import_cache(changed, model).cache, chat.cache)
        except damage:
            continue


def test_a_static_cache_that_claims_a_terabyte_is_refused(models):
    model = models["llama"]
    cache = StaticCache(config=model.config, max_cache_len=1 << 30)
    small = StaticCache(config=model.config, max_cache_len=MAX_TOKENS)
    answer(model, small, random_tokens(4, 0))
    for layer, filled in zip(cache.layers, small.layers, strict=True):
        vars(layer).update({**vars(filled), "max_cache_len": 1 << 30})
    with pytest.raises(hf.DamagedCacheError, match="at most"):
        hf.import_cache(hf.export_cache(cache, model), model)
