"""One question to an engine through the OpenAI client, timed, with what was imported for it.

Time to first token is measured on the stream, as a user sees it. A stream does not carry the
response's `kv_transfer_params`, so what was imported is read from the engine's counters before and
after; ask one question at a time.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

IMPORTED_TOKENS = "vllm:mcp_imported_tokens_total"
LOADED_BYTES = "vllm:mcp_loaded_bytes_total"
WIRE_BYTES = "vllm:mcp_wire_bytes_total"
FINISHED = "vllm:request_success_total"
SETTLE_DEADLINE_S = 10.0

Message = Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """An engine's answer to one turn; `ttft_ms` is what the client waited for the first token."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    imported_tokens: int
    ttft_ms: float
    raw_bytes: int
    wire_bytes: int


def client_of(base_url: str) -> OpenAI:
    """An OpenAI client for the engine at `base_url`."""
    return OpenAI(base_url=f"{base_url}/v1", api_key="unused", timeout=600, max_retries=0)


def counters(base_url: str) -> dict[str, float]:
    """The engine's counters, summed over their labels."""
    with urllib.request.urlopen(f"{base_url}/metrics", timeout=30) as response:
        text = response.read().decode()
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def ask(
    base_url: str,
    messages: Sequence[Message],
    max_tokens: int,
    *,
    transfer_params: Mapping[str, Any] | None = None,
    cache_salt: str | None = None,
    stop: Sequence[str] = (),
) -> Answer:
    """Send a chat turn, greedy, and wait for the whole answer: exactly `max_tokens` tokens, unless
    one of the texts in `stop` comes before."""
    client = client_of(base_url)
    model = client.models.list().data[0].id
    extra: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
    if transfer_params is not None:
        extra["kv_transfer_params"] = dict(transfer_params)
    if cache_salt is not None:
        extra["cache_salt"] = cache_salt
    before = counters(base_url)
    started_s = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[dict(message) for message in messages],  # type: ignore[misc]
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        stop=list(stop) or None,
        extra_body=extra,
    )
    text, token_ids, ttft_s, prompt_tokens = "", [], 0.0, 0
    for part in stream:
        if part.usage is not None:
            prompt_tokens = part.usage.prompt_tokens
        for choice in part.choices:
            new_ids = getattr(choice, "token_ids", None) or []
            if new_ids and not token_ids:
                ttft_s = time.perf_counter() - started_s
            token_ids.extend(new_ids)
            text += choice.delta.content or ""
    after = _settled(base_url, before)
    return Answer(
        text=text,
        token_ids=tuple(token_ids),
        prompt_tokens=prompt_tokens,
        imported_tokens=int(_grown(IMPORTED_TOKENS, before, after)),
        ttft_ms=1000 * ttft_s,
        raw_bytes=int(_grown(LOADED_BYTES, before, after)),
        wire_bytes=int(_grown(WIRE_BYTES, before, after)),
    )


def _settled(base_url: str, before: Mapping[str, float]) -> dict[str, float]:
    """The counters once they include the request that has just ended."""
    until_s = time.monotonic() + SETTLE_DEADLINE_S
    while True:
        after = counters(base_url)
        if _grown(FINISHED, before, after) >= 1 or time.monotonic() > until_s:
            return after
        time.sleep(0.05)


def _grown(name: str, before: Mapping[str, float], after: Mapping[str, float]) -> float:
    return after.get(name, 0.0) - before.get(name, 0.0)
