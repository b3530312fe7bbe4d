"""Real engines, a slow link and a fast one: the benchmark that measures it, on fewer rounds.

Its figures are held against wider margins than the benchmark's own: two engines and whatever else
runs share the cores. Without a decision the load would take `agent.load_ms`, 10 s, before the
prompt is computed after all.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow]
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "load_or_recompute.py"
LOOKUP_MS = 500
NOISE = 1.3
DEADLINE_S = 1200


def test_a_slow_link_holds_nobody_up_and_a_fast_one_is_used(tmp_path, log_folder):
    figures_path = tmp_path / "figures.json"
    options = ("--rounds", "2", "--lookup-ms", str(LOOKUP_MS), "--logs", str(log_folder))
    subprocess.run(
        [sys.executable, BENCHMARK, *options, "--json", figures_path],
        check=True,
        timeout=DEADLINE_S,
    )
    figures = json.loads(figures_path.read_text())
    ttft_ms = {case: statistics.median(times) for case, times in figures["ttft_ms"].items()}
    for case in ("slow link, not measured yet", "slow link, measured"):
        assert ttft_ms[case] <= NOISE * figures["bound_ms"], ttft_ms
    assert set(figures["imported"]["slow link, measured"]) == {0}
    assert all(tokens > 0 for tokens in figures["imported"]["fast link"])
