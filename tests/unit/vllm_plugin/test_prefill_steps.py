"""Which steps count as prefill, and how long each took, by a clock of our own."""

from types import SimpleNamespace

import pytest

from mcp_vllm.link.prefill import contexts_of
from mcp_vllm.vllm_plugin import prefill_steps
from mcp_vllm.vllm_plugin.prefill_steps import PrefillSteps


class Meter:
    """Keeps what it is told."""

    def __init__(self):
        self.noted = []

    def note(self, tokens, contexts, seconds):
        self.noted.append((tokens, contexts, pytest.approx(seconds)))


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(prefill_steps.time, "perf_counter", lambda: now.s)
    return now


def step(new=(), cached=()):
    """A scheduler's output: new (id, start, count), cached (id, start, count, outputs, resumed)."""
    counts = {row[0]: row[2] for row in (*new, *cached)}
    return SimpleNamespace(
        num_scheduled_tokens=counts,
        total_num_scheduled_tokens=sum(counts.values()),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, num_computed_tokens=start) for name, start, _ in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[row[0] for row in cached],
            num_computed_tokens=[row[1] for row in cached],
            num_output_tokens=[row[3] for row in cached],
            resumed_req_ids={row[0] for row in cached if row[4]},
        ),
    )


def test_a_prompt_counts_from_where_it_is_computed(clock):
    meter = Meter()
    steps = PrefillSteps(meter)
    steps.scheduled(step(new=[("a", 256, 100)]))
    clock.s += 0.5
    steps.ended()
    assert meter.noted == [(100, contexts_of(256, 356), 0.5)]


def test_the_later_chunks_of_a_prompt_and_resumed_requests_count(clock):
    meter = Meter()
    steps = PrefillSteps(meter)
    steps.scheduled(step(cached=[("a", 512, 200, 0, False), ("b", 0, 300, 7, True)]))
    clock.s += 1.0
    steps.ended()
    assert meter.noted == [(500, contexts_of(512, 712) + contexts_of(0, 300), 1.0)]


def test_decoding_does_not_count_nor_a_prompt_among_much_of_it(clock):
    meter = Meter()
    steps = PrefillSteps(meter)
    decodes = [(f"d{i}", 1000, 1, 5, False) for i in range(20)]
    for output in (step(cached=decodes), step(new=[("a", 0, 100)], cached=decodes), step()):
        steps.scheduled(output)
        clock.s += 1.0
        steps.ended()
    assert meter.noted == []


def test_idle_time_and_the_step_before_are_not_counted(clock):
    meter = Meter()
    steps = PrefillSteps(meter)
    clock.s += 50.0  # idle
    steps.scheduled(step(new=[("a", 0, 100)]))
    clock.s += 0.1
    steps.scheduled(step(new=[("b", 0, 200)]))  # while the first still runs
    clock.s += 0.3
    steps.ended()
    clock.s += 0.6
    steps.ended()
    assert [(tokens, seconds) for tokens, _, seconds in meter.noted] == [(100, 0.4), (200, 0.6)]


def test_ends_that_are_never_told_do_not_pile_up(clock):
    steps = PrefillSteps(Meter())
    for _ in range(10_000):
        steps.scheduled(step(new=[("a", 0, 100)]))
    assert len(steps._under_way) <= prefill_steps.MAX_UNDER_WAY
