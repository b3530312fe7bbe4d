"""The engine's side of tenants: what the tier finds, loads and stores for whom. Needs vLLM, and no
engine."""

from types import SimpleNamespace

import numpy as np
import pytest

from mcp_vllm.link import protocol
from mcp_vllm.session.manifest import SessionKey

base = pytest.importorskip("vllm.v1.kv_offload.base")
tiering = pytest.importorskip("vllm.v1.kv_offload.tiering.base")

OURS, THEIRS, SHARED, NOBODYS = (bytes([n]) * 36 for n in range(4))


class RecordingLink:
    """An agent's link that says what it was told to say."""

    def __init__(self) -> None:
        self.connected, self.asks_peers, self.wants_positions = True, False, False
        self.shared_tenants = ["prompts"]
        self.lookup_s = 1.0
        self.sent: list[object] = []
        self.events: list[object] = []

    def send(self, message: object) -> None:
        self.sent.append(message)

    def load(self, load: protocol.Load, chunk_ids: list[int]) -> None:
        self.sent.append(load)

    def poll(self) -> list[object]:
        events, self.events = self.events, []
        return events


@pytest.fixture
def tier(monkeypatch):
    from mcp_vllm.vllm_plugin import tier as module

    monkeypatch.setattr(module.SecondaryTierManager, "__init__", lambda self, **options: None)
    monkeypatch.setattr(module, "reopen_read_only", lambda fd: -1)
    monkeypatch.setattr(
        module.ContextTier,
        "_offloading_spec",
        SimpleNamespace(_scheduler_mmap=SimpleNamespace(fd=-1)),
        raising=False,
    )
    made = module.ContextTier()
    made._link = RecordingLink()
    made._link.events += [
        protocol.Inventory([OURS], [], "acme"),
        protocol.Inventory([THEIRS], [], "beta"),
        protocol.Inventory([SHARED], [], "prompts"),
    ]
    return made


def begin(tier, name: str, tenant: str | None):
    params = {"tenant": tenant} if tenant else None
    request = base.ReqContext(req_id=name, kv_transfer_params=params)
    tier.on_new_request(request)
    chain = [OURS, THEIRS, SHARED, NOBODYS]
    tier.prepare(request, SessionKey(tenant or "default", ""), False, [chain], None)
    return request


@pytest.mark.parametrize(
    ("tenant", "found"),
    [
        ("acme", {OURS, SHARED}),
        ("beta", {THEIRS, SHARED}),
        ("prompts", {SHARED}),
        (None, {SHARED}),
    ],
)
def test_a_request_finds_what_its_tenant_and_the_shared_ones_have(tier, tenant, found):
    request = begin(tier, "r", tenant)
    chain = (OURS, THEIRS, SHARED, NOBODYS)
    hits = {key for key in chain if tier.lookup(key, request) is base.LookupResult.HIT}
    assert hits == found


def test_what_left_the_agent_is_found_no_more(tier):
    request = begin(tier, "r", "acme")
    tier._link.events.append(protocol.Inventory([], [OURS], "acme"))
    tier._take_events()
    assert tier.lookup(OURS, request) is base.LookupResult.MISS
    assert set(tier._inventory) == {"beta", "prompts"}


@pytest.mark.parametrize("tenant", ["acme", None])
def test_loads_and_stores_say_whose_they_are_even_after_the_request(tier, tenant):
    request = begin(tier, "r", tenant)
    for job_id, is_load in ((1, True), (2, False)):
        job = tiering.TransferJob(job_id, [OURS], np.array([3]), is_load, request)
        if is_load:
            tier.submit_load(job)
            tier.on_request_finished(request)
        else:
            tier.submit_store(job)
    said = [m.tenant for m in tier._link.sent if isinstance(m, protocol.Load | protocol.Store)]
    assert said == [tenant or "default"] * 2
