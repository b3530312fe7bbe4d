"""The identity checks that every model family must pass; each family's module calls them."""

from concurrent.futures import ThreadPoolExecutor

from mcp_vllm.demo.pair import Pair
from tests.integration.engine_client import (
    NEAR_TIE,
    assert_same_or_near_tie,
    complete,
    counters,
    get_json,
    labelled_counters,
    page_digests,
)
from tests.waiting import wait_for

LOADED_CHUNKS = "vllm:mcp_loaded_chunks_total"


def urls(pair: Pair) -> tuple[str, str]:
    return pair["A"].engine.base_url, pair["B"].engine.base_url


def wait_until_stored(pair: Pair, name: str) -> None:
    """Until the host's agent has taken over what its engine computed."""
    host = pair[name]

    def settled() -> bool:
        totals = counters(host.agent_url)
        return totals["mcp_agent_stored_chunks_total"] > 0 and host_is_idle(host)

    wait_for(f"agent {name} to hold the blocks", settled)


def host_is_idle(host) -> bool:
    return get_json(f"{host.agent_url}/healthz")["busy_requests"] == 0


def lookups(pair: Pair) -> dict[str, float]:
    """What both sides counted about lookups, to explain a miss."""
    names = ("mcp_lookup", "mcp_agent_lookup", "peer_failures", "mcp_agent_stored_chunks")
    return {
        f"{name} {key}": value
        for name, host in pair.hosts.items()
        for url in (host.engine.base_url, host.agent_url)
        for key, value in labelled_counters(url).items()
        if any(part in key for part in names) and "_bucket" not in key
    }


def check_pages_and_tokens(pair: Pair, prompts: list[str]) -> None:
    """B's imported pages are A's, byte for byte, and B continues as A does from its own cache."""
    a, b = urls(pair)
    for number, prompt in enumerate(prompts):
        complete(a, prompt, 1)
        wait_until_stored(pair, "A")
        # From A's own prefix cache, or from its host chunks where the engine has no prefix cache.
        reference = complete(a, prompt)
        loaded_before = counters(b).get(LOADED_CHUNKS, 0)
        imported = complete(b, prompt, params={"session_id": f"identity-{number}"})
        assert imported.params["imported_tokens"] > 0, lookups(pair)
        assert imported.params["imported_from"] == [pair["A"].peer_address]
        assert 0 < imported.params["wire_bytes"] < imported.params["raw_bytes"]
        assert imported.tokens == reference.tokens, f"prompt {number}"
        num_chunks = counters(b)[LOADED_CHUNKS] - loaded_before
        shared = set(page_digests(a)) & set(page_digests(b))
        # A chunk is at least one page; pages of chunks imported for earlier prompts are shared too.
        assert len(shared) >= num_chunks > 0


def check_concurrent(pair: Pair, prompts: list[str], near_tie: float = NEAR_TIE) -> None:
    """All prompts at once on B: the tokens that A gives one after the other, near-ties aside."""
    a, b = urls(pair)
    references = [complete(a, prompt) for prompt in prompts]
    wait_until_stored(pair, "A")
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(b, prompt), prompts))
    assert sum(answer.params["imported_tokens"] > 0 for answer in answers) == len(prompts)
    for number, (reference, answer) in enumerate(zip(references, answers, strict=True)):
        assert_same_or_near_tie(reference, answer, f"concurrent prompt {number}", near_tie)
