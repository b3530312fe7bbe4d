"""What changes while a split serves, or because memory is short: other layers, other places."""

import random
import re
import threading

import pytest

from tests.integration.split_engine import Request, Signal, rss_anon_bytes
from tests.integration.split_parts import (
    assert_same_or_near_tie,
    assert_same_tokens,
    engine_of,
    finish,
    play,
    split_of,
    stage_of,
    start,
)
from tests.shaped_link import ShapedLink
from tests.simulated_security import Issuer, tls_files
from tests.tiny_models import VOCAB_SIZE, write_wide_model
from tests.waiting import wait_for

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TOKENS = 40


def requests(count: int, tokens: int = TOKENS, length: int = 200) -> list[Request]:
    rng = random.Random(count)
    lengths = [rng.randrange(20, length) for _ in range(count)]
    return [Request([rng.randrange(10, VOCAB_SIZE) for _ in range(n)], tokens) for n in lengths]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Thirty layers of 49 MiB: with what vLLM itself takes, more than LIMIT."""
    return write_wide_model(tmp_path_factory.mktemp("models") / "wide", num_layers=30)[0]


# What a vLLM process of this kind allocates without any layer is about 0.9 GiB, thread stacks and a
# file of weights included; this is 1.1 GiB more, and the model's layers are 1.44.
LIMIT = 2000 << 20
SMALL = {"max_num_seqs": 4, "num_gpu_blocks_override": 64}


def steps(stage) -> float:
    return stage.metric("mcp_stage_steps_total")


def test_a_model_too_large_for_one_process_runs_in_two(wide, capsys):
    """Each of the processes may allocate LIMIT bytes (RLIMIT_DATA)."""
    made = requests(4, 16)
    engine = engine_of(wide, **SMALL)
    whole = play(engine, made, data_bytes=LIMIT)
    assert whole.result is None
    assert "allocate memory" in whole.log
    with stage_of(wide, "8:22", "--kv-bytes", "64MiB", data_bytes=LIMIT) as stage:
        stage.wait_ready()
        engine["mcp_split"] = split_of("8:22", stage.address, local_fallback=False)
        split = play(engine, made, data_bytes=LIMIT)
        held = rss_anon_bytes(stage.pid)
    reference = play(engine_of(wide, **SMALL), made)
    assert_same_tokens(split.answers[0], reference.answers[0])
    with capsys.disabled():
        print(
            f"\nlimit {LIMIT >> 20} MiB: whole engine does not start; stage {held >> 20}, engine "
            f"{split.result.rss_anon_bytes >> 20}, whole {reference.result.rss_anon_bytes >> 20}"
        )


def test_a_stage_takes_as_many_layers_as_memory_has_and_fewer_when_it_has_less(wide, capsys):
    """`auto` believes that 28 layers fit, and the process's limit does not allow it."""
    made = requests(4, 16)
    auto = ("--memory-bytes", "4GiB", "--kv-bytes", "64MiB")
    with stage_of(wide, "auto", *auto, name="auto", data_bytes=LIMIT) as stage:
        stage.wait_ready()
        log = stage.log.read_text()
        assert "out of memory with layers 1:29: trying 4:26" in log
        ready = re.search(r"stage ready: layers (\d+):(\d+)", log)
        first, end = map(int, ready.groups())
        # How many depends on what vLLM takes beside them on this CPU, and what failed loads left.
        assert 4 < end - first <= 22
        layers = f"{first + 1}:{end - 1}"  # some of those that it holds
        engine = engine_of(wide, **SMALL, mcp_split=split_of(layers, stage.address))
        split = play(engine, made)
    assert_same_tokens(split.answers[0], play(engine_of(wide, **SMALL), made).answers[0])
    with capsys.disabled():
        print(f"\nauto under {LIMIT >> 20} MiB: {first}:{end} held, {layers} used")


def test_a_step_that_takes_too_long_is_tried_again_with_more_time_then_here(wide, capsys):
    """The stage answers pings, so it is alive; its steps of 2,000 tokens take far over 0.15 s."""
    rng = random.Random(4)
    made = [Request([rng.randrange(10, VOCAB_SIZE) for _ in range(600)], 4) for _ in range(3)]
    engine = engine_of(wide, **SMALL, max_num_batched_tokens=4096)
    with stage_of(wide, "1:29", "--kv-bytes", "512MiB", name="slow") as stage:
        stage.wait_ready()
        engine["mcp_split"] = split_of("1:29", stage.address, step_ms=100, connect_ms=60_000)
        split = play(engine, made)
    log = split.log
    assert "no answer within 0.1 s" in log, log[-5000:]
    assert "no answer within 0.15 s" in log
    assert "local layers took over" in log
    reference = play(engine_of(wide, **SMALL, max_num_batched_tokens=4096), made)
    ties = assert_same_or_near_tie(split.answers[0], reference.answers[0])
    with capsys.disabled():
        print("\n", *(line for line in log.splitlines() if "took over" in line), ties, sep="\n  ")


def test_layers_come_home_when_the_link_has_become_slow_for_good(tiny_model, capsys):
    """No request fails; their tokens are those of the whole engine."""
    model = tiny_model("llama")
    made = requests(8, 300)
    reference = play(engine_of(model), made).answers[0]
    with (
        stage_of(model, "1:3", name="replan") as stage,
        ShapedLink(("127.0.0.1", stage.port)) as shaped,
    ):
        stage.wait_ready()
        split = split_of("1:3", shaped.address, replan_s=1)
        with start(engine_of(model, mcp_split=split), made) as process:
            wait_for("steps at the stage", lambda: steps(stage) > 40, 300)
            shaped.delay_s = 0.04
            played = finish(process)
        answered = steps(stage)
    assert played.result is not None, played.log[-5000:]
    assert "local layers: moving" in played.log, played.log[-3000:]
    assert "local layers took over" in played.log
    assert played.result.kv_layers == 4
    assert answered < 340
    ties = assert_same_or_near_tie(played.answers[0], reference)
    with capsys.disabled():
        for line in played.log.splitlines():
            if "moving" in line or "took over" in line:
                print("\n  ", line.partition("] ")[2] or line)
        print("   near-ties:", ties)


def test_tls_on_both_sides_and_a_token_with_a_real_stage(tiny_model, tmp_path):
    model, made = tiny_model("llama"), requests(3, 8)
    ours = {name: str(path) for name, path in vars(tls_files(tmp_path)).items()}
    issuer = Issuer(tmp_path)
    (tmp_path / "token").write_text(issuer.token("stage:run"))
    (tmp_path / "other").write_text(issuer.token("blocks:read"))
    (tmp_path / "stage.yaml").write_text(
        f"layers: '1:3'\nsecurity: {{tls: {ours}, token_keys: {issuer.file}}}\n"
    )
    secure = {"tls": ours, "token_file": str(tmp_path / "token")}
    with stage_of(model, "1:3", "--config", str(tmp_path / "stage.yaml"), name="tls") as stage:
        stage.wait_ready()
        good = split_of("1:3", stage.address, **secure)
        played = play(engine_of(model, mcp_split=good), made)
        refused = [
            play(engine_of(model, mcp_split=split_of("1:3", stage.address, **each)), made)
            for each in (
                {"load_ms": 1000},
                {"tls": ours},
                {"tls": ours, "token_file": str(tmp_path / "other")},
            )
        ]
    assert_same_tokens(played.answers[0], play(engine_of(model), made).answers[0])
    complaints = [each.complaint() for each in refused]
    assert "no stage can be used" in complaints[0]
    assert "a token is needed" in complaints[1]
    assert "lacks the scope stage:run" in complaints[2]


def test_two_engines_use_other_layers_of_one_stage(gemma_model):
    model, made = gemma_model, requests(5, 16)
    reference = play(engine_of(model), made).answers[0]
    spans = ("2:9", "6:12")
    with stage_of(model, "2:16", "--leases", "2", name="spans") as stage:
        stage.wait_ready()
        answers = {}

        def run(span):
            split = split_of(span, stage.address, replan_s=0)
            answers[span] = play(engine_of(model, mcp_split=split), made).answers[0]

        threads = [threading.Thread(target=run, args=(span,)) for span in spans]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    for span in spans:
        assert_same_tokens(answers[span], reference)


def test_float16_here_and_bfloat16_at_the_stage(tiny_model, capsys):
    """Also when the layers come home, where they are float16."""
    model, made = tiny_model("llama"), requests(6, 24)
    reference = play(engine_of(model, dtype="float16"), made).answers[0]
    vllm_args = ("--block-size", "32", "--max-model-len", "1024", "--dtype", "bfloat16")
    with stage_of(model, "1:3", vllm_args=vllm_args, name="bf16") as stage:
        stage.wait_ready()
        engine = engine_of(model, dtype="float16")
        wrong = play(engine | {"mcp_split": split_of("1:3", stage.address)}, made)
        split = split_of("1:3", stage.address, stage_dtype="bfloat16")
        dying = Signal(step=12, pid=stage.pid, name="SIGKILL")
        mixed = play(engine | {"mcp_split": split}, made, signals=[dying])
    assert "dtype: ours is 'bfloat16', theirs is 'float16'" in wrong.complaint()
    assert mixed.result is not None, mixed.log[-5000:]
    assert mixed.result.kv_layers == 4
    pairs = [
        pair
        for a, b in zip(mixed.answers[0], reference, strict=True)
        for pair in zip(a.tokens, b.tokens, strict=True)
    ]
    same = sum(a == b for a, b in pairs) / len(pairs)
    with capsys.disabled():
        print(f"\nfloat16 with layers 1:3 in bfloat16: {same:.0%} of tokens as all in float16")
    assert same > 0.5
