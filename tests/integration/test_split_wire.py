"""What a stage gets to see: no token ids, no text, no sampling parameters, no names."""

import random
import struct

import msgspec
import pytest

from mcp_vllm.split import wire
from tests.integration.split_engine import Request
from tests.integration.split_parts import (
    Proxy,
    assert_same_or_near_tie,
    engine_of,
    play,
    split_of,
    stage_of,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SEED = 0x5EED1234
TEMPERATURE = 0.8134765625
NAME = "customer-4711"
TEXT = "The password of the harbour office is swordfish."


def encodings(values: list[int]) -> list[bytes]:
    """A run of integers as a program may write it: packed, JSON, plain arrays of any width."""
    count = len(values)
    kinds = "Hiq" if max(values) < 1 << 16 else "iq"
    arrays = [struct.pack(f"{order}{count}{kind}", *values) for order in "<>" for kind in kinds]
    packed = b"".join(msgspec.msgpack.encode(each) for each in values)
    return [packed, msgspec.json.encode(values)[1:-1], *arrays]


def number_encodings(value: float) -> list[bytes]:
    return [struct.pack("<d", value), struct.pack(">d", value), repr(value).encode()]


def secrets(prompts: list[list[int]], answers: list[list[int]]) -> dict[str, list[bytes]]:
    found = {"text": [TEXT[:24].encode(), TEXT[-24:].encode()], "name": [NAME.encode()]}
    wide = (struct.pack("<q", SEED), struct.pack(">q", SEED), str(SEED).encode())
    found["seed"] = [msgspec.msgpack.encode(SEED), *wide]
    found["temperature"] = number_encodings(TEMPERATURE)
    for kind, sequences in (("prompt", prompts), ("answer", answers)):
        runs = [each[i : i + 4] for each in sequences for i in range(0, len(each) - 4, 3)]
        found[kind] = [code for run in runs for code in encodings(run)]
    return found


def leaks(secret: dict[str, list[bytes]], seen: bytes) -> list[str]:
    return [kind for kind, codes in secret.items() if any(code in seen for code in codes)]


def test_the_wire_carries_no_tokens_text_or_sampling_parameters(gemma_model):
    from transformers import AutoTokenizer

    rng = random.Random(4)
    spoken = AutoTokenizer.from_pretrained(gemma_model)(TEXT * 4)["input_ids"]
    prompts = [spoken, [rng.randrange(1000, 60_000) for _ in range(90)]]
    made = [Request(prompts[0], 16), Request(prompts[1], 16, temperature=TEMPERATURE, seed=SEED)]
    with (
        stage_of(gemma_model, "6:12") as stage,
        Proxy(("127.0.0.1", stage.port)) as proxy,
    ):
        stage.wait_ready()
        split = split_of("6:12", proxy.address)
        engine = engine_of(gemma_model, mcp_split=split)
        played = play(engine, made, made, name=NAME)
        answers = [each.tokens for each in played.answers[0]]
        assert stage.metric("mcp_stage_steps_total") > 16
        log = stage.log.read_bytes()
    seen = bytes(proxy.sent + proxy.received)
    soon = wire.pack_header(wire.Kind.SOON, 0, 0, 0)
    assert soon in proxy.sent  # for they share this machine's cores
    assert soon in proxy.received
    # 2 x 640 bf16 values a token and direction: this is the traffic of those requests.
    assert len(seen) > 2 * 2560 * sum(len(each) for each in prompts)
    secret = secrets(prompts, answers)
    assert leaks(secret, seen) == []
    assert leaks(secret, log) == []


def test_noise_changes_what_is_sent_by_no_more_than_asked(gemma_model):
    rng = random.Random(5)
    made = [
        Request([rng.randrange(1000, 60_000) for _ in range(40 + 20 * i)], 12 + 4 * i)
        for i in range(3)
    ]
    noise = {"clip_norm": 1e6, "row_epsilon": 1e33}  # far below the last bit of any activation
    with stage_of(gemma_model, "6:12") as stage:
        stage.wait_ready()
        folded, noisy = (
            play(
                engine_of(gemma_model, mcp_split=split_of("6:12", stage.address, **settings)),
                made,
            )
            for settings in ({"form": "fold"}, {"noise": noise})
        )
    assert_same_or_near_tie(noisy.answers[0], folded.answers[0])


def test_a_leak_would_be_found():
    prompt = [1000 + 7 * i for i in range(20)]
    secret = secrets([prompt], [])
    assert leaks(secret, b"..." + msgspec.msgpack.encode({"prompt": prompt[3:]})) == ["prompt"]
    assert leaks(secret, struct.pack("<20i", *prompt)) == ["prompt"]
    assert leaks(secret, msgspec.msgpack.encode({"seed": SEED})) == ["seed"]
    assert leaks(secret, msgspec.msgpack.encode([TEMPERATURE])) == ["temperature"]
    assert leaks(secret, f"x {TEXT} {NAME}".encode()) == ["text", "name"]
