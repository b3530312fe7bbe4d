"""The load of `benchmarks/directory_load.py`, small: not timed, but nothing may go wrong."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "directory_load.py"


def test_many_requests_at_once_with_peers_get_what_was_stored_within_the_memory(tmp_path: Path):
    path = tmp_path / "report.json"
    small = {"sessions": 90, "requests": 30, "peers": 2, "chunks": 6, "chunk-kib": 64}
    arguments = [f"--{name}={value}" for name, value in small.items()]
    command = [sys.executable, str(SCRIPT), *arguments, "--seconds=4", f"--json={path}"]
    subprocess.run(command, check=True, timeout=180)
    report = json.loads(path.read_text())
    assert (report["errors"], report["wrong_chunks"]) == ({}, 0)
    assert all(held <= report["load"]["ram_bytes"] for held in report["held_bytes"])
    assert report["loaded_chunks"] > 0
    assert {"here", "at a peer", "nowhere"} <= report["lookups"].keys()
