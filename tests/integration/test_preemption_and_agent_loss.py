"""One engine with an agent of its own and a KV cache too small for its load: preemption, and an
agent that is killed while requests run."""

import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from mcp_vllm.demo.engines import Engine, free_port
from mcp_vllm.demo.pair import ENGINE_ARGS, START_DEADLINE_S
from tests.integration.engine_client import FLOAT32, assert_same_or_near_tie, complete, counters
from tests.integration.prompts import prompts
from tests.waiting import wait_for

pytestmark = pytest.mark.engine
NUM_CHARS = 1500
# Blocks of 128 tokens: the prompts of three requests fit, their answers of 300 tokens do not.
SMALL_CACHE = ("--num-gpu-blocks-override", "44")
CONFIG = {"host_cache_bytes": "256MiB", "agent": {"listen": "127.0.0.1:0", "ram_bytes": "1GiB"}}


@pytest.fixture(scope="module")
def engine(tiny_model, log_folder):
    ours = ("--kv-connector", "mcp", "--mcp-config", json.dumps(CONFIG))
    args = [*ENGINE_ARGS, *FLOAT32, *SMALL_CACHE, *ours]
    log_path = log_folder / "engine-small.log"
    with Engine.start(tiny_model("llama"), free_port(), args, log_path=log_path) as engine:
        engine.wait_ready(START_DEADLINE_S)
        yield engine


def test_preempted_requests_give_the_same_tokens(engine):
    asked = [f"Preempted. {prompt}" for prompt in prompts(8, NUM_CHARS)]
    references = [complete(engine.base_url, prompt, 300) for prompt in asked]
    before = counters(engine.base_url)["vllm:num_preemptions_total"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: complete(engine.base_url, prompt, 300), asked))
    assert counters(engine.base_url)["vllm:num_preemptions_total"] > before
    for number, (reference, answer) in enumerate(zip(references, answers, strict=True)):
        assert_same_or_near_tie(reference, answer, f"preempted prompt {number}")


def test_requests_survive_a_killed_agent_and_hits_resume(engine):
    asked = [f"Killed. {prompt}" for prompt in prompts(8, NUM_CHARS)]
    references = [complete(engine.base_url, prompt, 200) for prompt in asked]
    warnings_before = len(warnings_of(engine))
    losses = "vllm:mcp_agent_losses_total"
    before = counters(engine.base_url)
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(complete, engine.base_url, prompt, 200) for prompt in asked]
        wait_for(
            "requests to run", lambda: counters(engine.base_url)["vllm:num_requests_running"] > 0
        )
        os.kill(agent_of(engine).pid, signal.SIGKILL)
        answers = [future.result() for future in running]
    for number, (reference, answer) in enumerate(zip(references, answers, strict=True)):
        assert_same_or_near_tie(reference, answer, f"prompt {number} beside the kill")
    assert len(warnings_of(engine)) == warnings_before + 1
    complete(engine.base_url, "The counters travel with the next step.", 2)
    after = wait_for(
        "the loss to be counted",
        lambda: grown(counters(engine.base_url), before, losses) and counters(engine.base_url),
    )
    assert grown(after, before, losses) == 1
    wait_for("another agent", lambda: agent_of(engine), deadline_s=60)
    check_hits_resume(engine)


def check_hits_resume(engine):
    """What is computed now is brought back by the new agent after it left the engine's caches."""
    wanted = f"Resumed. {prompts(1, NUM_CHARS)[0]}"

    def stored() -> bool:
        before = counters(engine.base_url).get("vllm:mcp_stored_bytes_total", 0)
        complete(engine.base_url, f"{os.urandom(8).hex()} {wanted}", 2)
        return counters(engine.base_url)["vllm:mcp_stored_bytes_total"] > before

    wait_for("the new agent to take over blocks", stored, deadline_s=60)
    hits = "vllm:mcp_lookup_keys_total"
    before = counters(engine.base_url).get(hits, 0)
    complete(engine.base_url, wanted, 2)
    wait_for("an answered lookup", lambda: counters(engine.base_url)[hits] > before)


def agent_of(engine) -> psutil.Process | None:
    """The agent process that the engine started, once it is there."""
    for process in psutil.Process(engine.pid).children(recursive=True):
        try:
            if "mcp_vllm.agent" in process.cmdline():
                return process
        except psutil.Error:
            continue
    return None


def warnings_of(engine) -> list[str]:
    """Our warnings in the engine's log."""
    lines = engine.log_path.read_text(errors="replace").splitlines()
    return [line for line in lines if re.search(r"WARNING .*(context agent|could not be)", line)]


def grown(after, before, name) -> float:
    return after.get(name, 0) - before.get(name, 0)
