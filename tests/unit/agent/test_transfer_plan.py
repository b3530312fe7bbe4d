"""What is asked of a peer: the codec that suits the link, in requests of a bearable size."""

import pytest

from mcp_vllm.agent.link_meter import ASSUMED, LinkMeter
from mcp_vllm.agent.transfer_plan import (
    FIRST_REQUEST_BYTES,
    REQUEST_S,
    TransferPlan,
    sending_speeds,
)
from mcp_vllm.codec.speeds import Speed

MB = 1e6
SPEEDS = {
    "raw": Speed(9e9, 9e9, 1.0),
    "zstd": Speed(400 * MB, 1300 * MB, 1.38),
    "lossless": Speed(300 * MB, 700 * MB, 1.49),
}
SIZES = [400_000] * 100


def measured(mb_s: float, stored: str = "raw") -> TransferPlan:
    plan = TransferPlan()
    plan.learn_sender(stored, sending_speeds(stored, SPEEDS, 1))
    plan.meter.note_payload(int(mb_s * MB), 1.0)
    return plan


def ask(plan: TransferPlan, accepted=tuple(SPEEDS)) -> tuple[str, int]:
    return plan.next_request(SIZES, accepted, SPEEDS, 1)


def test_before_anything_is_known_the_peer_chooses_and_little_is_asked_for():
    assert ask(TransferPlan()) == ("", FIRST_REQUEST_BYTES // SIZES[0])


def test_a_first_request_over_an_unmeasured_link_is_small():
    plan = TransferPlan()
    plan.learn_sender("lossless", {})
    assert ask(plan) == ("lossless", FIRST_REQUEST_BYTES // SIZES[0])


def test_a_slow_link_gets_a_codec_and_a_fast_one_what_is_stored():
    assert ask(measured(1))[0] == "lossless"
    assert ask(measured(5000))[0] == "raw"


def test_a_request_lasts_about_as_long_as_it_should():
    _, count = ask(measured(10))
    seconds = count * SIZES[0] / SPEEDS["lossless"].ratio / (10 * MB)
    assert REQUEST_S / 2 < seconds <= REQUEST_S


def test_one_chunk_is_always_asked_for():
    assert ask(measured(0.01))[1] == 1


def test_only_what_both_sides_have_is_considered():
    plan = measured(1)
    plan.learn_sender("raw", {"zstd": 4e8, "unheard-of": 1.0})
    assert ask(plan)[0] == "zstd"
    assert ask(plan, accepted=("lossless",)) == ("", FIRST_REQUEST_BYTES // SIZES[0])


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_peer_that_claims_impossible_speeds_is_not_believed(rate):
    plan = measured(1)
    plan.learn_sender("raw", {"lossless": rate})
    assert ask(plan)[0] == "raw"


def test_seen_ratios_replace_the_synthetic_one():
    plan = measured(1)
    for _ in range(50):
        plan.learn_ratio("zstd", 3.0)
    assert ask(plan)[0] == "zstd"


def test_what_is_stored_costs_no_encoding_and_the_rest_is_decoded_first():
    speeds = sending_speeds("lossless", SPEEDS, 2)
    assert "lossless" not in speeds
    assert speeds["raw"] == pytest.approx(2 / (1 / (700 * MB) + 1 / 9e9))
    assert speeds["zstd"] == pytest.approx(2 / (1 / (700 * MB) + 1 / (400 * MB)))


def test_break_evens_are_told_for_what_may_be_used():
    plan = measured(100)
    found = plan.break_evens(plan.costs(SPEEDS, SPEEDS, 1))
    assert (found[0].below, found[-1].above) == ("lossless", "raw")
    assert not plan.break_evens({})


def test_an_unmeasured_link_is_assumed_ordinary():
    assert LinkMeter().link == ASSUMED


@pytest.mark.parametrize(("before", "after"), [(1000.0, 100.0), (10.0, 100.0)])
def test_a_tenfold_change_is_seen_after_half_a_second_of_transfer(before, after):
    meter = LinkMeter()
    for mb_s, seconds in ((before, 2.0), (after, 0.5)):
        for _ in range(100):
            meter.note_payload(int(mb_s * MB * seconds / 100), seconds / 100)
    assert meter.link.bytes_s == pytest.approx(after * MB, rel=0.35)


def test_latency_follows_slowly():
    meter = LinkMeter()
    meter.note_latency(0.1)
    assert meter.link.latency_s == 0.1
    meter.note_latency(0.2)
    assert 0.1 < meter.link.latency_s < 0.15


def test_a_wait_that_was_cut_short_says_something_only_of_a_fast_link():
    slow, fast = LinkMeter(), LinkMeter()
    slow.note_payload(16_000, 0.3)
    fast.note_payload(10_000_000, 0.3)
    for meter in (slow, fast):
        before = meter.link.bytes_s
        meter.note_silence(0.3)
        assert (meter.link.bytes_s == before) == (meter is slow)


def test_an_old_measurement_does_not_make_a_link_slow_for_ever():
    meter = LinkMeter()
    meter.note_payload(10_000, 1.0)
    assert meter.expected == meter.link
    meter.last_s -= 3600
    assert meter.expected.bytes_s == ASSUMED.bytes_s
    meter.note_payload(1_000_000, 0.01)
    assert meter.link.bytes_s == pytest.approx(100e6)
