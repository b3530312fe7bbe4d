"""Where a context is cheapest to go on with, as an agent says without asking anybody."""

import pytest
from simulated import GROUPS, SimulatedEngine, address, keys, metric, running_agent, settings, until
from simulated_sessions import ALICE, call, turn, two_agents

from mcp_vllm.client import AsyncMCPClient
from mcp_vllm.link.prefill import PrefillCost
from mcp_vllm.link.protocol import GroupLayout
from mcp_vllm.routing import rank
from mcp_vllm.session.manifest import SessionKey

# One group keeps everything, one the last two chunks.
LAYOUTS = [
    GroupLayout(group.spans, group.element, group.channels, tokens=16, window_chunks=window)
    for group, window in zip(GROUPS, (0, 2), strict=True)
]
CHAINS = [keys(0, 1, 2, 3), keys(0, 1, 2, 3, group=1)]
HELD = [*CHAINS[0], *CHAINS[1][2:]]
NUM_TOKENS = 64  # of the chunks; the turn has 48
SLOW = PrefillCost(step_s=0.1, token_s=0.01, context_s=0.0, step_tokens=2048)
PLACEMENTS = f"{ALICE}/placements"


async def session_at(agent, folder, name: str = "a", names=HELD) -> None:
    with SimulatedEngine(folder / f"{name}.sock", groups=LAYOUTS) as engine:
        await engine.connected()
        await engine.store(names, range(len(names)))
        engine.prepare("cost", prefill=SLOW)
        await turn(agent, engine, chains=CHAINS)
        await until(lambda: agent._context.prefills, "the cost")


def by_agent(answer) -> dict[str, dict]:
    return {each["agent"]: each for each in answer["placements"]}


async def known(agent, turns: int = 1) -> None:
    name = SessionKey("default", "alice")
    await until(lambda: any(s.turns == turns for _, s in agent._peers.holders_of(name)), "the news")
    await until(
        lambda: all(peer.directory.num_chunks == len(HELD) for peer in agent._peers), "the chunks"
    )


async def test_who_has_a_session_costs_nothing_and_the_other_what_it_takes_to_have_it(tmp_path):
    async with two_agents(tmp_path) as (a, b, _):
        await session_at(a, tmp_path)
        await known(b)
        answer = (await call(a, "GET", PLACEMENTS))[1]
        assert [each["agent"] for each in answer["placements"]] == ["", address(b)]
        here, there = answer["placements"]
        assert here["held_chunks"] == len(HELD)
        assert (here["held_tokens"], here["cost_s"]) == (48, 0)
        assert (there["held_chunks"], there["held_tokens"]) == (0, 0)
        assert 0 < there["cost_s"] < there["recompute_s"] == pytest.approx(0.1 + 0.48)
        assert metric(a, "mcp_agent_peer_lookups_total", by="network") == 0


async def test_a_copy_makes_both_cost_nothing(tmp_path):
    async with two_agents(tmp_path) as (a, b, _):
        await session_at(a, tmp_path)
        await call(a, "POST", f"{ALICE}/copy", {"to": address(b)})
        await known(a)
        found = by_agent((await call(a, "GET", PLACEMENTS))[1])
        assert [each["cost_s"] for each in found.values()] == [0, 0]


async def test_what_has_only_the_beginning_computes_or_loads_the_rest(tmp_path):
    async with two_agents(tmp_path) as (a, b, _):
        await session_at(a, tmp_path)
        with SimulatedEngine(tmp_path / "b.sock", groups=LAYOUTS) as engine:
            await engine.connected()
            part = [*CHAINS[0][:2], *CHAINS[1][:2]]
            await engine.store(part, range(4))
            await until(
                lambda: all(p.directory.num_chunks == 4 for p in a._peers), "the other's chunks"
            )
        there = by_agent((await call(a, "GET", PLACEMENTS))[1])[address(b)]
        assert (there["held_chunks"], there["held_tokens"]) == (2 + 2, 32)
        assert 0 < there["cost_s"] < there["recompute_s"]


async def test_a_session_that_is_only_announced_is_answered_from_that(tmp_path):
    async with two_agents(tmp_path) as (a, b, link):
        await session_at(a, tmp_path)
        await known(b)
        found = by_agent((await call(b, "GET", PLACEMENTS))[1])
        assert (found[link.address]["cost_s"], found[link.address]["held_tokens"]) == (0, 48)
        assert found[""]["cost_s"] == found[""]["recompute_s"] > 0


async def test_a_prompt_is_placed_by_the_hashes_of_its_blocks(tmp_path):
    async with two_agents(tmp_path) as (a, b, _):
        await session_at(a, tmp_path)
        await known(b)
        namespace = next(iter(a._context.fingerprints)).hex()
        asked = {
            "tenant": "default",
            "namespace": namespace,
            "keys": [key.hex() for chain in CHAINS for key in chain],
        }
        found = by_agent((await call(a, "POST", "/v1/placements", asked))[1])
        assert found[""]["held_tokens"] == NUM_TOKENS
        other = by_agent((await call(a, "POST", "/v1/placements", asked | {"tenant": "x"}))[1])
        assert {each["held_chunks"] for each in other.values()} == {0}
        for bad in ({"keys": ["zz"]}, {"keys": ["00"]}, {"namespace": "?"}, {"num_tokens": -1}):
            assert (await call(a, "POST", "/v1/placements", asked | bad))[0] == 400


async def test_a_session_that_nobody_has_is_no_session(tmp_path):
    async with running_agent(settings(), tmp_path / "a.sock") as agent:
        assert (await call(agent, "GET", PLACEMENTS))[0] == 404


async def test_the_client_and_the_hook_send_a_request_where_its_context_is(tmp_path):
    async with two_agents(tmp_path) as (a, b, link):
        await session_at(a, tmp_path)
        await known(b)
        agents = {"http://engine-a": link.address, "http://engine-b": address(b)}
        async with AsyncMCPClient(f"http://{address(b)}") as client:
            placements = await client.placements("alice")
        ranked = rank(placements, agents, asked=address(b))
        assert [each.engine for each in ranked] == ["http://engine-a", "http://engine-b"]
