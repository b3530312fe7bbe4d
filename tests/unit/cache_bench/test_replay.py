"""The benchmark's policies against each other, on traces made for it."""

from __future__ import annotations

import json
from pathlib import Path

import generated_traces
import pytest
from typer.testing import CliRunner

from mcp_vllm.cache_bench import belady, trace
from mcp_vllm.cache_bench.classics import CLASSICS, Lru
from mcp_vllm.cache_bench.replay import BELADY, SMART_CACHE, PrefillModel, policies, replay
from mcp_vllm.cache_bench.trace import Trace
from mcp_vllm.cli.main import app
from mcp_vllm.errors import McpError


def rates(made: Trace, capacity: int) -> dict[str, float]:
    scores = replay(made, [capacity], policies(False), PrefillModel(), lambda done, total: None)
    return {score.policy: score.hit_rate for score in scores}


@pytest.mark.parametrize("divisor", [30, 10])
def test_smart_cache_beats_every_classic_on_chats(divisor: int) -> None:
    made = generated_traces.chats()
    found = rates(made, made.num_blocks // divisor)
    best = max(found[name] for name in CLASSICS)
    assert found[SMART_CACHE] >= 1.05 * best
    assert found[SMART_CACHE] <= found[BELADY]


def test_what_the_last_request_was_like_does_not_count_for_shared_prompts() -> None:
    made = generated_traces.templates()
    found = rates(made, made.num_blocks // 300)
    assert found[SMART_CACHE] >= 1.08 * max(found[name] for name in CLASSICS)


@pytest.mark.parametrize(
    ("made", "capacity"),
    [
        (generated_traces.scan(), 100),
        pytest.param(generated_traces.scan(), 200, marks=pytest.mark.slow),
        pytest.param(generated_traces.scan(), 1000, marks=pytest.mark.slow),
        (generated_traces.loop(200), 200),
        pytest.param(generated_traces.loop(1000), 1000, marks=pytest.mark.slow),
        (generated_traces.shift(), 50),
        pytest.param(generated_traces.shift(), 200, marks=pytest.mark.slow),
        (generated_traces.flood(), 300),
        pytest.param(generated_traces.flood(), 1000, marks=pytest.mark.slow),
        (generated_traces.popular(), 300),
        pytest.param(generated_traces.popular(), 3000, marks=pytest.mark.slow),
        (generated_traces.agents(), 200),
        pytest.param(generated_traces.agents(), 2000, marks=pytest.mark.slow),
        (generated_traces.calls(), 300),
        pytest.param(generated_traces.calls(), 3000, marks=pytest.mark.slow),
    ],
    ids=[
        "scan",
        "scan-middle",
        "scan-wide",
        "loop",
        "loop-wide",
        "shift",
        "shift-wide",
        "flood",
        "flood-wide",
        "popular",
        "popular-wide",
        "agents",
        "agents-wide",
        "calls",
        "calls-wide",
    ],
)
def test_smart_cache_never_falls_far_behind_the_best_classic(made: Trace, capacity: int) -> None:
    found = rates(made, capacity)
    assert found[SMART_CACHE] >= 0.95 * max(found[name] for name in CLASSICS)


@pytest.mark.parametrize("name", CLASSICS)
@pytest.mark.parametrize("capacity", [1, 2, 7, 100])
def test_a_classic_holds_no_more_than_its_capacity(name: str, capacity: int) -> None:
    made = generated_traces.chats(60)
    policy = CLASSICS[name](capacity)
    for request in made.requests:
        policy.request(request.blocks)
        assert sum(block in policy for block in range(made.num_blocks)) <= capacity


def test_nothing_beats_belady() -> None:
    made = generated_traces.chats(200)
    found = rates(made, made.num_blocks // 10)
    assert max(found.values()) == found[BELADY]


def test_lru_and_belady_by_hand() -> None:
    made = generated_traces.trace_of([(0, [1, 2]), (1, [3]), (2, [1, 2]), (3, [1, 2])])
    lru = Lru(2)
    # 3 pushes out 2, the leaf; then 2 comes back and all of it hits.
    assert [lru.request(request.blocks) for request in made.requests] == [0, 0, 1, 2]
    assert belady.hits_of(made, 2) == [0, 0, 2, 2]


def lines(made: Trace) -> str:
    return "".join(
        json.dumps(
            {
                "timestamp": request.time_s * 1000,
                "input_length": request.num_tokens,
                "output_length": request.num_output_tokens,
                "hash_ids": request.blocks,
            }
        )
        + "\n"
        for request in made.requests
    )


def test_the_command_prints_writes_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, figures, picture = tmp_path / "t.jsonl", tmp_path / "f.json", tmp_path / "p.png"
    file.write_text(lines(generated_traces.chats(80)), encoding="utf-8")
    command = ["bench", "cache", "--trace", file, "--capacity", "5%", "--capacity", "200"]
    command += ["--ablate", "--json", figures, "--png", picture]
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert len(found["scores"]) == 2 * len(policies(True))
    assert {score["capacity"] for score in found["scores"]} >= {200}
    assert all(0 <= score["hit_rate"] <= 1 for score in found["scores"])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("", "holds no request"), ("{}\n", "line 1"), ('{"timestamp": 0, "hash_ids": 5}', "line 1")],
)
def test_a_file_of_another_format_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(McpError, match=complaint):
        trace.read(file)


def test_the_block_size_is_read_off_the_lengths(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(lines(generated_traces.chats(20)), encoding="utf-8")
    assert trace.read(file).block_tokens == 512
