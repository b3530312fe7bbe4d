"""`LLM(...)` in a Python program, with the connector in both forms that the README shows."""

import os
import subprocess
import sys

import pytest

from mcp_vllm.demo.engines import default_environment

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROGRAM = """
import sys
from vllm import LLM, SamplingParams
import mcp_vllm.vllm_plugin

if __name__ == "__main__":
    common = dict(model=sys.argv[1], enforce_eager=True, max_model_len=2048)
    settings = {"host_cache_bytes": "64MiB", "agent": {"listen": "127.0.0.1:0"}}
    if sys.argv[2] == "config":
        extra = {"mcp": settings}
        transfer = {
            "kv_connector": "mcp", "kv_role": "kv_both", "kv_connector_extra_config": extra,
        }
        llm = LLM(**common, kv_transfer_config=transfer)
    else:
        import json
        mcp_vllm.vllm_plugin.register()
        llm = LLM(**common, kv_connector="mcp", mcp_config=json.dumps(settings))
    prompt = "All hands on deck. " * 40
    sampling = SamplingParams(temperature=0, max_tokens=4)
    first = llm.generate([prompt], sampling)[0]
    assert llm.reset_prefix_cache()
    second = llm.generate([prompt], sampling)[0]
    assert second.num_cached_tokens > 0, "nothing came back from the host chunks"
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    print("OK", second.num_cached_tokens)
"""


@pytest.mark.parametrize("form", ["config", "keyword"])
def test_llm_stores_and_loads_through_the_connector(tiny_model, tmp_path, form):

    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, str(program), str(tiny_model("llama")), form],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | default_environment(),
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "OK" in result.stdout
