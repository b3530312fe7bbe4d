"""The example of a chat that resumes in another process, on a small model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def test_the_example_resumes_in_another_process_with_the_same_tokens(tiny_model, tmp_path):
    document = tmp_path / "document.txt"
    document.write_text("The ship is called Halcyon. " * 30)
    example = REPOSITORY / "examples" / "hf_resume.py"
    options = ["--model", str(tiny_model("llama")), "--document", str(document)]
    run = subprocess.run(
        [sys.executable, str(example), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "third answer: identical tokens, 16 of them" in run.stdout
    assert "bytes on disk" in run.stdout
