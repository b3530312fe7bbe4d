"""The harness on a tiny made-up Llama: what goes through frames is what is scored."""

from pathlib import Path

import pytest

from mcp_vllm.codec import get_codec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mcp_vllm.quality import calibrate, own_text, report, restore, run  # noqa: E402
from mcp_vllm.quality.model import Model, UnusableModel, prefill  # noqa: E402

SETTING = run.Setting(prefix=64, continuation=17, block=16, most_segments=3, greedy=4)


class LettersTokenizer:
    """A token a byte."""

    bos_token_id = 0

    def __call__(self, text: str, **_: object) -> object:
        ids = torch.tensor([list(text.encode())])
        return type("Encoding", (), {"input_ids": ids})


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    network = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    return Model(Path("tiny"), network, LettersTokenizer())


@pytest.fixture(scope="module")
def calibration(model):
    spans = calibrate.windows_of_text(model, calibrate.library_text(4000), 4)
    return calibrate.calibrate(model, spans, lambda done, total: None)


def nothing(done: int, total: int) -> None:
    assert 0 < done <= total


def test_what_lossless_frames_restore_costs_nothing(model, calibration):
    lossless = run.Contestant.parse("lossless", None)
    measured = run.run(model, {"t": "abc " * 60}, [lossless], None, SETTING, nothing)["lossless"]
    line = run.summarize(measured)
    assert line["segments"] == 3
    assert (line["dppl_percent"], line["kl"], line["top1_percent"]) == (0, 0, 100)
    assert line["greedy_match"] == SETTING.greedy


def test_a_coarser_step_is_smaller_and_every_text_is_reported(model, calibration):
    labels = ["balanced", "small", "small:0.2"]
    contestants = [run.Contestant.parse(label, calibration) for label in labels]
    texts = {"one": calibrate.library_text(300), "two": "def f(x): return x " * 20}
    measured = run.run(model, texts, contestants, calibration, SETTING, nothing)
    made = report.as_json(measured, contestants, calibration, SETTING, "tiny")
    ratios = [codec["ratio"] for codec in made["codecs"]]
    assert ratios == sorted(ratios)
    assert made["codecs"][-1]["kl"] > 0
    assert [set(codec["texts"]) for codec in made["codecs"]] == [{"one", "two"}] * 3
    assert report.table(made).row_count == 9


def test_the_first_tokens_and_those_past_the_last_block_are_exact(model, calibration):
    context = model.context(model.tokens_of("the quick brown fox " * 3))[:, :50]
    tensors = [(k.bfloat16().float(), v.bfloat16().float()) for k, v in prefill(model, context)]
    codec = get_codec("small", calibration=calibration)
    restored = restore.restore(tensors, 16, codec, calibration)
    for before, after in zip(tensors, restored.tensors, strict=True):
        for kept in (slice(0, 16), slice(48, 50)):
            assert torch.equal(before[0][:, kept], after[0][:, kept])
        assert not torch.equal(before[1], after[1])


def test_keys_are_calibrated_without_their_rotation(calibration):
    expected = 10000.0 ** (-torch.arange(8) / 8)
    for band in calibration.bands:
        assert torch.allclose(torch.from_numpy(band.frequencies), expected, rtol=1e-5)


def test_a_text_that_is_too_short_is_refused(model, calibration):
    lossless = run.Contestant.parse("lossless", None)
    with pytest.raises(Exception, match="--prefix"):
        run.run(model, {"t": "abc"}, [lossless], None, SETTING, nothing)
    with pytest.raises(UnusableModel, match="--windows"):
        calibrate.windows_of_text(model, "abc", 4)


def test_the_model_writes_windows_of_its_own_that_begin_with_the_openers(model):
    windows = own_text.own_tokens(model, 17, 8, nothing)
    assert [len(window) for window in windows] == [8] * 17
    for window, opener in zip(windows, own_text.OPENERS, strict=False):
        opened = model.tokens_of(opener)[:8]
        assert window[: len(opened)].tolist() == opened.tolist()
    again = own_text.own_tokens(model, 17, 8, nothing)
    assert all(map(torch.equal, windows, again))
