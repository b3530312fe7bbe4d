"""Gemma-3-270m (six KV cache groups, sliding windows) on two hosts: identity, sessions, isolation.

The tests share one pair of engines; each uses prompts of its own, so that none depends on what
another left behind.
"""

import urllib.error
import urllib.parse

import pytest

from mcp_vllm import MCPClient
from mcp_vllm.demo.ask import client_of
from mcp_vllm.demo.document import research_ship_manual
from mcp_vllm.demo.engines import quick_dtype_args
from mcp_vllm.demo.pair import START_DEADLINE_S
from mcp_vllm.demo.weights import ensure_gemma
from tests.integration.conftest import start_pair
from tests.integration.engine_client import (
    NEAR_TIE_BF16,
    NO_IMPORT,
    assert_same_or_near_tie,
    complete,
    counters,
    get_json,
)
from tests.integration.identity import (
    check_concurrent,
    check_pages_and_tokens,
    host_is_idle,
    urls,
    wait_until_stored,
)
from tests.integration.prompts import prompts
from tests.waiting import wait_for

pytestmark = pytest.mark.engine
NUM_CHARS = 6000  # about 1,400 of Gemma's tokens


@pytest.fixture(scope="module")
def pair(log_folder):
    yield from start_pair(ensure_gemma(progress=False), log_folder, quick_dtype_args())


def test_imported_pages_and_tokens_equal_the_sources(pair):
    check_pages_and_tokens(pair, prompts(8, NUM_CHARS))


def test_eight_at_once_give_the_same_tokens(pair):
    asked = [f"At once. {prompt}" for prompt in prompts(8, NUM_CHARS)]
    check_concurrent(pair, asked, NEAR_TIE_BF16)


def test_a_session_moves_with_its_generated_tokens(pair):
    a, b = urls(pair)
    params = {"session_id": "moving", "tenant": "tests"}
    first = complete(a, f"Move. {research_ship_manual()}\n\n", 200, params=params)
    second_turn = [*first.prompt_ids, *first.tokens, *first.prompt_ids[-40:]]
    wait_until_stored(pair, "A")
    moved = complete(b, second_turn, params=params)
    # The answer's own blocks were stored too: more is imported than the first prompt has.
    assert moved.params["imported_tokens"] > len(first.prompt_ids)
    assert moved.params["session_id"] == "moving"
    assert moved.params["import_ms"] > 0
    # A itself keeps less of the answer in its prefix cache, so it computes a longer remainder.
    reference = complete(a, second_turn, params={**params, **NO_IMPORT})
    assert_same_or_near_tie(reference, moved, "second turn", NEAR_TIE_BF16)
    wait_for("the turn in B's manifest", lambda: session(pair["B"], "tests", "moving"))
    assert session(pair["A"], "tests", "moving")["turns"] == 2
    assert session(pair["B"], "tests", "moving")["num_tokens"] > len(first.prompt_ids)


SENT_CHUNKS = "mcp_agent_sent_chunks_total"


def chunks_sent(pair):
    return sum(counters(host.agent_url)[SENT_CHUNKS] for host in pair.hosts.values())


def test_a_session_that_was_moved_is_there_before_its_next_turn(pair):
    a, b = urls(pair)
    params = {"session_id": "ordered", "tenant": "tests"}
    prompt = f"Ordered. {research_ship_manual()}"
    complete(a, prompt, 1, params=params)
    pair["A"].wait_until_stored("ordered", tenant="tests")
    reference = complete(a, prompt)
    with MCPClient(pair["A"].agent_url, tenant="tests") as client:
        moved = client.move("ordered", to=pair["B"].peer_address)
    assert moved.num_sent == moved.num_chunks > 0
    assert session(pair["A"], "tests", "ordered") is None
    answer = complete(b, prompt, params=params)
    assert answer.params["imported_from"] == ["agent"]
    assert answer.params["wire_bytes"] == 0
    assert answer.tokens == reference.tokens


def test_a_chat_that_changes_its_engine_at_every_turn_sends_nothing_twice(pair):
    a, b = urls(pair)
    params = {"session_id": "to and fro", "tenant": "tests"}
    tokens = list(complete(a, f"To and fro. {research_ship_manual()}", 1).prompt_ids)
    sent_before, fetched = chunks_sent(pair), 0
    for turn in range(6):
        url, name = ((b, "B"), (a, "A"))[turn % 2]
        answer = complete(url, tokens, 100, params=params)
        fetched += answer.params["wire_bytes"] > 0
        tokens += [*answer.tokens, *tokens[: 128 - 100]]
        pair[name].wait_until_stored("to and fro", turns=turn // 2 + 1, tenant="tests")
    assert fetched >= 5
    held = session(pair["A"], "tests", "to and fro")["held_chunks"]
    assert chunks_sent(pair) - sent_before <= held
    assert complete(a, tokens).tokens == complete(b, tokens).tokens


def test_a_stream_may_name_its_session_in_a_header(pair):
    a, _ = urls(pair)
    client = client_of(a)
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": f"Header. {research_ship_manual()}"}],
        max_tokens=4,
        stream=True,
        extra_headers={"X-Session-Id": "from a header", "X-Tenant-Id": "tests"},
    )
    assert sum(len(part.choices) for part in stream) > 0
    found = wait_for(
        "the session of the header", lambda: session(pair["A"], "tests", "from a header")
    )
    assert found["turns"] == 1


def test_without_a_session_the_content_is_found_all_the_same(pair):
    a, b = urls(pair)
    prompt = f"No session. {research_ship_manual()}"
    complete(a, prompt, 1)
    wait_until_stored(pair, "A")
    answer = complete(b, prompt, 1)
    assert answer.params["session_id"] is None
    assert answer.params["imported_tokens"] > 0


def test_different_salts_share_nothing(pair):
    a, b = urls(pair)
    prompt = f"Salted. {research_ship_manual()}"
    complete(a, prompt, 1, salt="one")
    wait_until_stored(pair, "A")
    assert complete(b, prompt, 1, salt="two").params["imported_tokens"] == 0
    assert complete(b, prompt, 1).params["imported_tokens"] == 0
    assert complete(b, prompt, 1, salt="one").params["imported_tokens"] > 0


def test_a_tenant_imports_its_own_blocks_and_nobody_elses(pair):
    a, b = urls(pair)
    own, others = (f"Tenants, {which}. {research_ship_manual()}" for which in ("own", "others"))
    for prompt in (own, others):
        complete(a, prompt, 1, params={"tenant": "acme", "session_id": prompt[:16]})
    pair["A"].wait_until_stored(others[:16], tenant="acme")
    assert complete(b, own, 1, params={"tenant": "acme"}).params["imported_tokens"] > 0
    assert complete(b, others, 1, params={"tenant": "beta"}).params["imported_tokens"] == 0
    # A's own caches know no tenants: beta's session there is whole from what acme's request stored.
    complete(a, own, 1, params={"tenant": "beta", "session_id": "second"})
    acmes = session(pair["A"], "acme", own[:16])
    betas = wait_for("beta's session", lambda: session(pair["A"], "beta", "second"))
    assert betas["held_chunks"] == acmes["held_chunks"] > 0


def test_a_session_of_impossible_name_does_not_fail_the_request(pair):
    a, _ = urls(pair)
    answer = complete(a, "A name that cannot be.", 2, params={"session_id": ["not", "text"]})
    assert len(answer.tokens) == 2
    assert answer.params["session_id"] is None


def test_cancelled_requests_leave_nothing_behind(pair):
    a, b = urls(pair)
    cancelled = [f"Cancelled. {prompt}" for prompt in prompts(4, NUM_CHARS)]
    for prompt in cancelled:
        complete(a, prompt, 1)
    wait_until_stored(pair, "A")
    for prompt in cancelled:
        stream_and_hang_up(b, prompt)
    wait_for("B's agent to be idle", lambda: host_is_idle(pair["B"]))
    wait_for("B's engine to be idle", lambda: counters(b)["vllm:num_requests_running"] == 0)
    for prompt in cancelled:
        reference = complete(a, prompt, 16, params=NO_IMPORT)
        assert complete(b, prompt, 16).tokens == reference.tokens


def test_a_restarted_engine_is_warm_from_its_agent(pair):
    _, b = urls(pair)
    prompt = f"Restart. {research_ship_manual()}"
    complete(b, prompt, 64)
    wait_until_stored(pair, "B")
    reference = complete(b, prompt, 64, params=NO_IMPORT)
    pair["B"].engine.stop()
    engine = pair["B"].start_engine(ensure_gemma(progress=False), quick_dtype_args())
    engine.wait_ready(START_DEADLINE_S)
    warm = complete(engine.base_url, prompt, 64)
    assert warm.params["imported_from"] == ["agent"]
    assert warm.params["wire_bytes"] == 0
    assert warm.tokens == reference.tokens


def session(host, tenant, session_id):
    """The session as its agent shows it, or None."""
    name = urllib.parse.quote(session_id)
    try:
        return get_json(f"{host.agent_url}/v1/sessions/{tenant}/{name}")
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def stream_and_hang_up(base_url, prompt):
    """Open a stream, take one token and close the connection."""
    client = client_of(base_url)
    stream = client.completions.create(
        model=client.models.list().data[0].id, prompt=prompt, max_tokens=512, stream=True
    )
    next(iter(stream))
    stream.close()
