"""One stage, several engines; engines and strangers that it refuses; and what it holds."""

import random
import socket

import msgspec
import pytest

from mcp_vllm.demo.engines import Engine, free_port
from mcp_vllm.split import wire
from mcp_vllm.split.channel import Channel, Patience
from mcp_vllm.split.same_cores import name_cores
from mcp_vllm.split.wire import Continued, Hello, Kind, KvInit, NewRequest, Step, Welcome
from tests.integration.engine_client import complete
from tests.integration.split_engine import Request, rss_anon_bytes
from tests.integration.split_parts import (
    BLOCK,
    MODEL_LEN,
    START_S,
    assert_same_tokens,
    engine_of,
    finish,
    play,
    split_of,
    stage_of,
    start,
)
from tests.tiny_models import VOCAB_SIZE, write_wide_model
from tests.waiting import wait_for

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LAYERS = "1:3"


def requests(seed: int, count: int, tokens: int) -> list[Request]:
    rng = random.Random(seed)
    lengths = [rng.randrange(10, 300) for _ in range(count)]
    return [Request([rng.randrange(10, VOCAB_SIZE) for _ in range(n)], tokens) for n in lengths]


def test_two_engines_share_a_stage_and_one_notices_nothing_of_the_others_death(tiny_model):
    model = tiny_model("llama")
    long, short = requests(1, 8, 700), requests(2, 6, 64)
    reference = play(engine_of(model), short).answers[0]
    with stage_of(model, LAYERS, "--leases", "2") as stage:
        stage.wait_ready()
        engine = engine_of(model, mcp_split=split_of(LAYERS, stage.address))
        with start(engine, long, long, long) as victim:
            wait_for("the first engine's steps", lambda: steps(stage) > 5, 300)
            with start(engine, short) as other:
                wait_for("two leases", lambda: stage.metric("mcp_stage_leases ") == 2, 300)
                before = steps(stage)
                wait_for("steps of both", lambda: steps(stage) > before + 10, 300)
                victim.kill()
                wait_for("the lease's end", lambda: stage.metric("mcp_stage_leases ") < 2)
                survivor = finish(other)
        assert survivor.result is not None, survivor.log[-5000:]
        assert_same_tokens(survivor.answers[0], reference)
        assert "is lost" not in survivor.log
        wait_for("no lease", lambda: stage.metric("mcp_stage_leases ") == 0)


def steps(stage) -> float:
    return stage.metric("mcp_stage_steps_total")


@pytest.mark.parametrize(
    ("difference", "complaint"),
    [
        ("weights", "model.weights"),
        ("block size", f"block_tokens: ours is '{BLOCK}', theirs is '{2 * BLOCK}'"),
        ("no stage", "no stage can be used"),
        ("async", "--mcp-split contradicts --async-scheduling"),
    ],
)
def test_an_engine_that_does_not_fit_is_told_so_in_one_line(
    tiny_model, stage, difference, complaint
):
    engine = engine_of(tiny_model("llama"), mcp_split=split_of(LAYERS, stage.address))
    if difference == "weights":
        engine["model"] = str(tiny_model("llama", 1))
    elif difference == "block size":
        engine["block_size"] = 2 * BLOCK
    elif difference == "no stage":
        engine["mcp_split"] = split_of(LAYERS, "127.0.0.1:9", load_ms=1000)
    else:
        engine["async_scheduling"] = True
    played = play(engine, requests(3, 1, 2))
    assert played.result is None
    assert complaint in played.complaint(), played.log[-3000:]


@pytest.fixture(scope="module")
def stage(tiny_model):
    with stage_of(tiny_model("llama"), LAYERS) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def hello(tiny_model, stage) -> Hello:
    """What a fitting engine says, put together from the stage's own complaints."""
    facts: dict[str, str] = {}
    for _ in range(20):
        said = Hello(facts, MODEL_LEN, 8, 256, "raw")
        answer = first_answer(stage, said)
        if answer.kind == Kind.WELCOME:
            return said
        message = wire.decode(wire.Error, answer.metadata).message
        name, _, rest = message.partition(": ")[2].partition(": ours is '")
        facts[name] = rest.partition("', theirs")[0]
    raise AssertionError(facts)


def first_answer(stage, hello):
    with socket.create_connection(("127.0.0.1", stage.port), 10) as connection:
        channel = Channel(connection)
        channel.max_metadata = wire.MAX_METADATA_BYTES
        channel.send(Kind.HELLO, hello)
        return channel.receive(Patience(silence_s=20, total_s=20))


def connected(stage, hello):
    """A channel with a lease and KV blocks."""
    wait_for("a free lease", lambda: stage.metric("mcp_stage_leases ") == 0)
    channel = Channel(socket.create_connection(("127.0.0.1", stage.port), 10))
    channel.max_metadata = wire.MAX_METADATA_BYTES
    channel.send(Kind.HELLO, hello)
    answer = channel.receive(Patience(silence_s=20, total_s=20))
    welcome = wire.decode(Welcome, answer.metadata)
    layers = sorted(welcome.kv_specs)
    group = wire.KvGroup(layers, welcome.kv_specs[layers[0]])
    channel.send(Kind.KV_INIT, KvInit(64, None, [group]))
    answer = channel.receive(Patience(silence_s=20, total_s=20))
    assert answer.kind == Kind.OK, bytes(answer.metadata)
    channel.max_payload = 1 << 20
    return channel, welcome


@pytest.mark.parametrize("here", [True, False])
def test_a_stage_tells_an_engine_that_has_the_same_cores(stage, hello, here):
    cores = name_cores() if here else "salt:of-another-machine"
    wait_for("a free lease", lambda: stage.metric("mcp_stage_leases ") == 0)
    answer = first_answer(stage, msgspec.structs.replace(hello, cores=cores))
    assert wire.decode(Welcome, answer.metadata).shares_cores == (here and bool(cores))


ONE = NewRequest(1, 40, 0, [[1, 2]])


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        (Step([], [ONE], [], [(1, 300)], [], []), "300 tokens, allowed are 256"),
        (Step([], [ONE], [], [(1, MODEL_LEN + 1)], [], []), "tokens from 0"),
        (Step([], [NewRequest(1, 40, 0, [[1, 64]])], [], [(1, 40)], [], []), "from 0 to 63"),
        (Step([], [NewRequest(1, 40, 0, [[-1]])], [], [(1, 40)], [], []), "from 0 to 63"),
        (Step([], [NewRequest(1, 40, 0, [[1], [2]])], [], [(1, 40)], [], []), "2 groups, not 1"),
        (Step([], [NewRequest(1, 9999, 0, [[1]])], [], [(1, 40)], [], []), "9999 prompt tokens"),
        (Step([], [], [Continued(5, 3, None)], [(5, 1)], [], []), "was never there"),
        (Step([4], [], [], [], [], []), "request 4 ends and was never there"),
        (Step([], [ONE, ONE], [], [(1, 40)], [], []), "was there already"),
        (Step([], [ONE], [], [(2, 40)], [], []), "request 2: 40 tokens from None"),
        (Step([], [ONE], [], [(1, 40)], [64], []), "from 0 to 63"),
        (Step([], [ONE], [], [(1, 40)], [], [(0, 99)]), "from 0 to 63"),
    ],
)
def test_a_step_that_cannot_be_is_refused_by_name(stage, hello, step, complaint):
    channel, _ = connected(stage, hello)
    channel.send(Kind.STEP, step, step=1)
    if step.scheduled:
        channel.send(Kind.ACTS, wire.Acts([1]), [memoryview(bytes(1024))], step=1)
    answer = channel.receive(Patience(silence_s=20, total_s=20))
    channel.close()
    assert answer.kind == Kind.ERROR
    assert complaint in wire.decode(wire.Error, answer.metadata).message


@pytest.mark.parametrize("payload_bytes", [0, 1024, 40 * 256 * 2 * 2 - 1])
def test_activations_of_another_size_are_refused(stage, hello, payload_bytes):
    channel, _ = connected(stage, hello)
    channel.send(Kind.STEP, Step([], [ONE], [], [(1, 40)], [], []), step=1)
    channel.send(Kind.ACTS, wire.Acts([1]), [memoryview(bytes(payload_bytes))], step=1)
    answer = channel.receive(Patience(silence_s=20, total_s=20))
    channel.close()
    assert answer.kind == Kind.ERROR
    assert "of activations for 40 tokens" in wire.decode(wire.Error, answer.metadata).message


def test_more_blocks_than_the_lease_has_memory_for_are_refused(stage, hello):
    wait_for("a free lease", lambda: stage.metric("mcp_stage_leases ") == 0)
    with socket.create_connection(("127.0.0.1", stage.port), 10) as connection:
        channel = Channel(connection)
        channel.max_metadata = wire.MAX_METADATA_BYTES
        channel.send(Kind.HELLO, hello)
        answer = channel.receive(Patience(silence_s=20, total_s=20))
        welcome = wire.decode(Welcome, answer.metadata)
        layers = sorted(welcome.kv_specs)
        group = wire.KvGroup(layers, welcome.kv_specs[layers[0]])
        channel.send(Kind.KV_INIT, KvInit(1 << 24, None, [group]))
        answer = channel.receive(Patience(silence_s=20, total_s=20))
    error = wire.decode(wire.Error, answer.metadata)
    assert error.code == "memory"
    assert f"this lease has {256 << 20}" in error.message


def test_the_stage_still_serves_after_all_that(stage, hello):
    wait_for("a free lease", lambda: stage.metric("mcp_stage_leases ") == 0)
    assert first_answer(stage, hello).kind == Kind.WELCOME
    other = msgspec.structs.replace(hello, facts={**hello.facts, "dtype": "float16"})
    wait_for("a free lease", lambda: stage.metric("mcp_stage_leases ") == 0)
    assert b"dtype: ours is 'bfloat16'" in first_answer(stage, other).metadata
    for layers, complaint in (("2:4", b"wanted, this stage holds 1:3"), ("x", b"not FIRST:END")):
        wait_for("a free lease", lambda: stage.metric("mcp_stage_leases ") == 0)
        other = msgspec.structs.replace(hello, layers=layers)
        assert complaint in first_answer(stage, other).metadata


def test_vllm_serve_gives_the_tokens_of_the_whole_engine(tiny_model, stage, log_folder):
    """The engine core in a process of its own, behind the API server."""
    wait_for("a free lease", lambda: stage.metric("mcp_stage_leases ") == 0)
    model, prompt = tiny_model("llama"), "All hands on deck, and mind the gap. " * 8
    tokens = []
    for split in ((), ("--mcp-split", split_of(LAYERS, stage.address))):
        arguments = ["--block-size", str(BLOCK), "--max-model-len", str(MODEL_LEN), *split]
        log = log_folder / f"serve-{'split' if split else 'whole'}.log"
        with Engine.start(
            model, free_port(), ["--enforce-eager", *arguments], log_path=log
        ) as engine:
            engine.wait_ready(START_S)
            tokens.append(complete(engine.base_url, prompt, 40).tokens)
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 40


def test_a_stage_of_layers_that_must_stay_says_why_in_its_last_line(tiny_model):
    with stage_of(tiny_model("llama"), "1:4") as stage:
        assert stage.process.wait(START_S) == 1
        last = stage.log.read_text().strip().splitlines()[-1]
    assert last.startswith("layers 1:4 of a model with 4: the first and the last one must stay")


def test_a_stage_holds_its_layers_and_nothing_else(tmp_path, capsys):
    """Two stages of one model, one with five layers more: their memory differs by those."""
    model, layer_bytes = write_wide_model(tmp_path / "wide", num_layers=8)
    with stage_of(model, "1:2", name="narrow") as narrow, stage_of(model, "1:7") as wide:
        narrow.wait_ready()
        wide.wait_ready()
        difference = rss_anon_bytes(wide.pid) - rss_anon_bytes(narrow.pid)
    engine = engine_of(model, max_num_seqs=2, num_gpu_blocks_override=64)  # KV of a few MiB
    whole = play(engine, requests(5, 1, 2)).result
    with stage_of(model, "1:7") as stage:
        engine["mcp_split"] = split_of("1:7", stage.address)
        split = play(engine, requests(5, 1, 2)).result
    saved = whole.rss_anon_bytes - split.rss_anon_bytes
    with capsys.disabled():
        print(f"\na layer's weights: {layer_bytes >> 20} MiB")
        print(f"five layers more at a stage: {difference >> 20} MiB of memory")
        print(f"six layers less in an engine: {saved >> 20} MiB of memory")
    assert 0.85 < difference / (5 * layer_bytes) < 1.15
    assert 0.85 < saved / (6 * layer_bytes) < 1.3
