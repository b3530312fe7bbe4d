"""What one tenant has is nothing to another: neither in the store nor at peers."""

from contextlib import asynccontextmanager

import pytest
from simulated import SimulatedEngine, address, keys, metric, running_agent, settings
from simulated_security import SecuredSettings, audit_lines
from simulated_sessions import CHAINS, NAMES, call, engine_with_session, turn, two_agents

from mcp_vllm.session.manifest import SessionKey
from mcp_vllm.store.ram import ChunkKey

SOMEWHERE = [20, 21, 22, 23]


@asynccontextmanager
async def engine_at(folder, name: str = "a"):
    with SimulatedEngine(folder / f"{name}.sock") as engine:
        await engine.connected()
        yield engine


def held(agent, tenant: str) -> set[bytes]:
    return {name.key for name in agent._context.store if name.tenant == tenant}


async def test_a_tenants_chunks_are_misses_to_every_other(tmp_path):
    async with (
        running_agent(settings(), tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path, tenant="acme") as engine,
        engine_at(tmp_path) as other,
    ):
        for tenant in ("beta", "default"):
            other.prepare("r", tenant=tenant)
            assert await other.lookup("r", NAMES, tenant) == [0] * 4
            done = await other.load("r", NAMES, SOMEWHERE, tenant)
            assert (done.failed, done.causes) == ({0, 1, 2, 3}, ("gone",))
        engine.prepare("mine", tenant="acme")
        assert await engine.lookup("mine", NAMES, "acme") == [1] * 4
        assert not (await engine.load("mine", NAMES, SOMEWHERE, "acme")).failed
        await other.told_of("acme", NAMES)
        assert set(other.inventory) == {"acme"}
        assert held(agent, "acme") == set(NAMES)


async def test_peers_are_asked_as_the_tenant_and_answer_as_for_what_they_lack(tmp_path):
    async with (
        two_agents(tmp_path) as (a, b, _),
        engine_with_session(a, tmp_path, tenant="acme") as source,
        engine_at(tmp_path, "b") as there,
    ):
        there.prepare("s", tenant="acme")
        await there.finds("s", NAMES, "acme")
        there.prepare("r", tenant="beta")
        assert await there.lookup("r", NAMES, "beta") == [0] * 4
        assert (await there.load("r", NAMES, SOMEWHERE, "beta")).failed == {0, 1, 2, 3}
        assert not (await there.load("s", NAMES, SOMEWHERE, "acme")).failed
        assert there.payload(20) == source.payload(0)
        assert (held(b, "acme"), held(b, "beta")) == (set(NAMES), set())


async def test_what_a_shared_tenant_has_is_everybodys_and_is_not_kept_twice(tmp_path):
    shared = {"tenants": {"shared": ["prompts"]}}
    async with (
        two_agents(tmp_path, **shared) as (a, b, _),
        engine_with_session(a, tmp_path, tenant="prompts") as engine,
        engine_at(tmp_path, "b") as there,
    ):
        assert there.link.shared_tenants == ["prompts"]
        engine.fill(4, 9)
        await engine.store([*NAMES, *keys(9)], [0, 1, 2, 3, 4], tenant="acme")
        assert held(a, "acme") == set(keys(9))
        there.prepare("s", tenant="acme")
        await there.finds("s", [*NAMES, *keys(9)], "acme")
        there.prepare("r", tenant="beta")
        assert await there.lookup("r", [*NAMES, *keys(9)], "beta") == [1, 1, 1, 1, 0]
        assert not (await there.load("r", NAMES, SOMEWHERE, "beta")).failed
        assert there.payload(20) == engine.payload(0)
        assert (held(b, "prompts"), held(b, "beta")) == (set(NAMES), set())
        # A session on shared chunks is whole, moves, and leaves what is not its own.
        await turn(a, engine, "s", [[*NAMES[:3], *keys(9)], NAMES[3:]], "acme")
        status, moved = await call(a, "POST", "/v1/sessions/acme/s/move", {"to": address(b)})
        assert (status, moved["num_chunks"], moved["num_sent"]) == (200, 5, 1)
        assert (held(a, "acme"), held(a, "prompts")) == (set(), set(NAMES))
        assert (await call(b, "GET", "/v1/sessions/acme/s"))[1]["held_chunks"] == 5
        assert (await call(a, "DELETE", "/v1/sessions/prompts/alice"))[0] == 204
        assert held(a, "prompts") == set(NAMES), "they leave by eviction only"


async def test_the_same_content_is_two_chunks_and_one_tenant_cannot_take_the_others_away(tmp_path):
    async with (
        running_agent(settings(), tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path, tenant="acme"),
        engine_with_session(agent, tmp_path, tenant="beta"),
    ):
        assert held(agent, "acme") == held(agent, "beta") == set(NAMES)
        assert (await call(agent, "DELETE", "/v1/sessions/acme/alice"))[0] == 204
        assert (held(agent, "acme"), held(agent, "beta")) == (set(), set(NAMES))
        agent._context.store.check_integrity()


async def test_what_an_engine_had_for_another_tenant_completes_a_session_that_used_it(tmp_path):
    """An engine computes equal content once (its own caches know no tenants): the second tenant's
    session is whole all the same, and looks no different from one that came first."""
    async with (
        running_agent(settings(), tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path, tenant="acme") as engine,
    ):
        await turn(agent, engine, "s", CHAINS, "beta")
        _, shown = await call(agent, "GET", "/v1/sessions/beta/s")
        assert (shown["held_chunks"], shown["num_chunks"]) == (4, 4)
        engine.prepare("r", tenant="beta")
        assert not (await engine.load("r", NAMES, SOMEWHERE, "beta")).failed
        assert engine.payload(20) == engine.payload(0)
        # ... which gives nobody else anything, and nothing for a turn that did not use it.
        await turn(agent, engine, "t", [NAMES[:1], []], "gamma")
        assert held(agent, "gamma") == set(NAMES[:1])


@pytest.mark.parametrize("named", [True, False])
async def test_over_its_quota_a_tenant_loses_its_own_and_everybody_is_told(tmp_path, named):
    quota = {"ram_bytes": "100KiB", "sessions": 2}
    tenants = {"quotas": [{"tenant": "acme", **quota}]} if named else quota
    secured = SecuredSettings(audit_file=tmp_path / "audit")
    config = secured.config(tenants=tenants)
    async with (
        running_agent(config, tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path, tenant="beta"),
        engine_with_session(agent, tmp_path, tenant="acme") as engine,
    ):
        for number in range(10, 20):
            engine.fill(5, number)
            await engine.store(keys(number), [5], tenant="acme")
            await turn(agent, engine, f"s{number}", [keys(number), []], "acme")
        for number in range(20, 40):
            engine.fill(5, number)
            await engine.store(keys(number), [5], tenant="acme")
        store = agent._context.store
        assert store.tenants.held_bytes("acme") <= 100 << 10
        store.check_integrity()
        assert held(agent, "beta") == set(NAMES)
        assert ChunkKey(next(iter(agent._context.fingerprints)), keys(39)[0], "acme") in store
        kept = {m.key for m in agent._context.sessions}
        assert kept == {
            SessionKey("beta", "alice"),
            *(SessionKey("acme", f"s{n}") for n in (18, 19)),
        }
        tenant = "acme" if named else "(other)"
        for kind, least in (("chunk", 1), ("session", 9)):
            name = "mcp_agent_quota_evictions_total"
            assert metric(agent, name, tenant=tenant, kind=kind) >= least
    lines = [each for each in audit_lines(tmp_path / "audit") if each["event"] == "quota"]
    assert {each["tenant"] for each in lines} == {"acme"}
    assert sum(each["sessions"] for each in lines) == 9
