"""What integration tests ask of a real engine: greedy tokens with runners-up, KV pages."""

import json
import urllib.request
from dataclasses import dataclass
from typing import Any

from mcp_vllm.demo.ask import client_of, counters

# A greedy choice whose two best logits are closer than this may flip when the batch's shape differs
# (other kernels, other rounding), in plain vLLM as with us. Tiny models run in float32.
NEAR_TIE = 0.01
FLOAT32 = ("--dtype", "float32")
# Gemma runs in bfloat16: its best logits lie between 16 and 32, where neighbours are 0.125 apart.
NEAR_TIE_BF16 = 0.13

NO_IMPORT = {"max_load_tokens": 0}


@dataclass(frozen=True)
class Completion:
    """Greedy tokens, the log-probability gap to the runner-up at each step, what was imported."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]
    params: dict[str, Any]
    prompt_ids: tuple[int, ...]


def complete(
    base_url: str,
    prompt: str | list[int],
    max_tokens: int = 64,
    *,
    params: dict[str, Any] | None = None,
    salt: str | None = None,
    headers: dict[str, str] | None = None,
) -> Completion:
    """A greedy completion of exactly `max_tokens` tokens through the OpenAI client."""
    client = client_of(base_url)
    extra: dict[str, Any] = {
        "return_token_ids": True,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,  # or tokens of equal text would be one entry
    }
    if params is not None:
        extra["kv_transfer_params"] = params
    if salt is not None:
        extra["cache_salt"] = salt
    response = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        logprobs=2,
        extra_body=extra,
        extra_headers=headers,
    )
    choice = response.choices[0]
    return Completion(
        tokens=tuple(choice.token_ids),
        gaps=tuple(_gap(top) for top in choice.logprobs.top_logprobs),
        params=response.kv_transfer_params or {},
        prompt_ids=tuple(choice.prompt_token_ids or ()),
    )


def _gap(top: dict[str, float]) -> float:
    best = sorted(top.values(), reverse=True)
    return best[0] - best[1] if len(best) > 1 else float("inf")


def assert_same_or_near_tie(
    reference: Completion, other: Completion, what: str, near_tie: float = NEAR_TIE
) -> None:
    """Equal tokens, or a first difference where the reference itself nearly chose otherwise."""
    for step, (ours, theirs) in enumerate(zip(reference.tokens, other.tokens, strict=True)):
        if ours != theirs:
            gap = reference.gaps[step]
            print(f"{what}: near-tie at step {step}, top-two gap {gap:.5f}")
            assert gap < near_tie, f"{what}: step {step}: {ours} became {theirs}, gap {gap}"
            return


def page_digests(base_url: str) -> list[str]:
    """Digests of the engine's KV pages (needs `PageReader` and the development endpoints)."""
    body = json.dumps({"method": "page_digests"}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{base_url}/collective_rpc", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["results"][0]


def labelled_counters(url: str) -> dict[str, float]:
    """The samples of a server's `/metrics` by name and labels, as they stand there."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def get_json(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as response:
        return json.load(response)


__all__ = [
    "FLOAT32",
    "NEAR_TIE",
    "NEAR_TIE_BF16",
    "NO_IMPORT",
    "Completion",
    "assert_same_or_near_tie",
    "complete",
    "counters",
    "get_json",
    "labelled_counters",
    "page_digests",
]
