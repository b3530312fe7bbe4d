"""Every metric that the engine publishes for us, in one place (on vLLM's own `/metrics`)."""

from __future__ import annotations

from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
)


class EngineMetrics:
    """Metric names; Prometheus adds `_total` to counters."""

    AGENT_UP = "vllm:mcp_agent_up"
    AGENT_LOSSES = "vllm:mcp_agent_losses"
    LOOKUP_KEYS = "vllm:mcp_lookup_keys"
    LOADED_CHUNKS = "vllm:mcp_loaded_chunks"
    FAILED_CHUNKS = "vllm:mcp_failed_chunks"
    LOADED_BYTES = "vllm:mcp_loaded_bytes"
    WIRE_BYTES = "vllm:mcp_wire_bytes"
    STORED_BYTES = "vllm:mcp_stored_bytes"
    IMPORTED_TOKENS = "vllm:mcp_imported_tokens"


def definitions() -> dict[str, OffloadingMetricMetadata]:
    """What vLLM needs to know to publish them."""
    m = EngineMetrics
    counter, gauge = OffloadingCounterMetadata, OffloadingGaugeMetadata
    return {
        m.AGENT_UP: gauge("1 while the context agent is connected, else 0."),
        m.AGENT_LOSSES: counter("Times that the connection to the context agent was lost."),
        m.LOOKUP_KEYS: counter(
            "Chunks looked up at the agent, by result; `timeout` counts as a miss.", ("result",)
        ),
        m.LOADED_CHUNKS: counter("Chunks brought by the agent."),
        m.FAILED_CHUNKS: counter(
            "Chunks that the agent could not bring and the engine recomputes, by cause.", ("cause",)
        ),
        m.LOADED_BYTES: counter("Bytes of KV brought by the agent."),
        m.WIRE_BYTES: counter("Bytes that crossed the network for them."),
        m.STORED_BYTES: counter("Bytes of KV that the agent took over."),
        m.IMPORTED_TOKENS: counter(
            "Prompt tokens loaded from peers, the agent or host chunks instead of computed."
        ),
    }
