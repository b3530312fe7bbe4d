"""Every metric of a stage, in one place; served at `/metrics` of its HTTP address."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class StageMetrics:
    """The stage's metrics; names start with `mcp_stage_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.leases = Gauge("mcp_stage_leases", "Engines with a lease", registry=r)
        self.steps = Counter("mcp_stage_steps", "Steps run", registry=r)
        self.tokens = Counter("mcp_stage_tokens", "Tokens of steps run", registry=r)
        self.step_seconds = Histogram(
            "mcp_stage_step_seconds",
            "From a step's activations to its reply",
            buckets=SECONDS,
            registry=r,
        )
        self.refusals = Counter(
            "mcp_stage_refusals", "Connections refused or ended, by reason", ["reason"], registry=r
        )
