"""The session operations, on whole agents: nothing is lost, nothing half-done is seen."""

import asyncio
import json
from urllib.parse import quote

import numpy as np
import pytest
from simulated import SimulatedEngine, address, keys, metric, running_agent, settings, until
from simulated_sessions import (
    ALICE,
    NAMES,
    call,
    engine_with_session,
    turn,
    two_agents,
)

from mcp_vllm.session.manifest import SessionKey
from mcp_vllm.store.ram import ChunkKey


def num_held(agent) -> int:
    return len(agent._context.store)


async def loads_everything(engine, source) -> None:
    engine.prepare("check")
    assert await engine.lookup("check", NAMES) == [1] * 4
    done = await engine.load("check", NAMES, [20, 21, 22, 23])
    assert not done.failed
    for index, group in enumerate((0, 0, 0, 1)):
        assert engine.payload(20 + index, group) == source.payload(index, group)


async def test_a_session_moves_and_is_whole_on_the_other_side_only(tmp_path):
    async with two_agents(tmp_path) as (a, b, _), engine_with_session(a, tmp_path) as source:
        status, moved = await call(a, "POST", f"{ALICE}/move", {"to": address(b)})
        assert (status, moved["num_chunks"], moved["num_sent"]) == (200, 4, 4)
        assert 0 < moved["wire_bytes"] < moved["raw_bytes"]
        assert (await call(a, "GET", ALICE))[0] == 404
        assert num_held(a) == 0
        _, shown = await call(b, "GET", ALICE)
        assert (shown["turns"], shown["num_tokens"], shown["held_chunks"]) == (1, 48, 4)
        with SimulatedEngine(tmp_path / "b.sock") as there:
            await there.connected()
            await loads_everything(there, source)


async def test_a_copy_stays_and_a_second_one_sends_only_what_is_new(tmp_path):
    async with two_agents(tmp_path) as (a, b, _), engine_with_session(a, tmp_path) as source:
        await call(a, "POST", f"{ALICE}/copy", {"to": address(b)})
        source.fill(4, 4)
        await source.store(keys(3), [4])
        await turn(a, source, chains=[keys(0, 1, 2, 3), NAMES[3:]])
        _, again = await call(a, "POST", f"{ALICE}/copy", {"to": address(b)})
        assert (again["num_chunks"], again["num_sent"]) == (5, 1)
        assert metric(a, "mcp_agent_sent_chunks_total") == 5
        assert (await call(a, "GET", ALICE))[1]["turns"] == 2
        assert (await call(b, "GET", ALICE))[1]["turns"] == 2


async def test_a_transfer_that_breaks_is_taken_up_where_it_stopped(tmp_path):
    async with two_agents(tmp_path) as (a, b, link), engine_with_session(a, tmp_path):
        link.bytes_s = 60e3
        moving = asyncio.create_task(call(a, "POST", f"{ALICE}/move", {"to": address(b)}))
        await until(lambda: num_held(b) >= 1, "the first chunk")
        link.cut()
        link.bytes_s = 1e9
        status, moved = await moving
        assert (status, moved["num_chunks"]) == (200, 4)
        assert metric(a, "mcp_agent_sent_chunks_total") <= 6
        assert (await call(b, "GET", ALICE))[1]["held_chunks"] == 4


async def test_a_peer_that_is_gone_costs_nothing_of_the_session(tmp_path):
    async with (
        running_agent(settings("127.0.0.1:9"), tmp_path / "a.sock") as a,
        engine_with_session(a, tmp_path),
    ):
        status, answer = await call(a, "POST", f"{ALICE}/move", {"to": "127.0.0.1:9"})
        assert status == 502
        assert "127.0.0.1:9" in answer["error"]
        assert (await call(a, "GET", ALICE))[1]["held_chunks"] == 4


async def test_an_agent_that_is_no_peer_is_not_pulled_from(tmp_path):
    async with two_agents(tmp_path) as (_, b, _), running_agent(
        settings(address(b)), tmp_path / "c.sock"
    ) as stranger, engine_with_session(stranger, tmp_path, "c"):  # fmt: skip
        status, _ = await call(stranger, "POST", f"{ALICE}/copy", {"to": address(b)})
        assert status == 502
        assert num_held(b) == 0


async def test_a_fork_shares_every_chunk_and_lives_on_without_its_origin(tmp_path):
    async with (
        running_agent(settings(), tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path),
    ):
        held = num_held(agent)
        status, forked = await call(agent, "POST", f"{ALICE}/fork", {"new_id": "bob"})
        assert (status, forked["session_id"], num_held(agent)) == (200, "bob", held)
        assert (await call(agent, "POST", f"{ALICE}/fork", {"new_id": "bob"}))[0] == 409
        assert (await call(agent, "DELETE", ALICE))[0] == 204
        assert num_held(agent) == held
        assert (await call(agent, "GET", "/v1/sessions/default/bob"))[1]["held_chunks"] == 4
        await call(agent, "DELETE", "/v1/sessions/default/bob")
        assert num_held(agent) == 0
        agent._context.store.check_integrity()


async def test_a_pinned_session_outlives_everything_else_until_its_time(tmp_path):
    async with (
        running_agent(settings(ram_bytes=1 << 20), tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path) as engine,
    ):
        assert (await call(agent, "POST", f"{ALICE}/pin", {"ttl_s": 3600}))[0] == 200
        for number in range(100, 300):
            engine.fill(5, number)
            await engine.store(keys(number), [5])
        _, shown = await call(agent, "GET", ALICE)
        assert shown["held_chunks"] == 4
        assert shown["pinned_until_s"] > shown["last_used_s"] + 3000
        assert (await call(agent, "POST", f"{ALICE}/pin", {"ttl_s": 0.01}))[0] == 200
        name = ChunkKey(next(iter(agent._context.fingerprints)), NAMES[0])
        await until(lambda: name not in agent._context.store._pins, "the pin's end")
        for number in range(300, 500):
            engine.fill(5, number)
            await engine.store(keys(number), [5])
        assert (await call(agent, "GET", ALICE))[1]["held_chunks"] == 0
        agent._context.store.check_integrity()


async def test_what_would_fill_the_memory_cannot_be_pinned(tmp_path):
    async with running_agent(settings(ram_bytes=1 << 20), tmp_path / "a.sock") as agent:
        with SimulatedEngine(tmp_path / "a.sock", num_chunks=64) as engine:
            await engine.connected()
            random = np.random.default_rng(0)
            for number in range(40):
                engine.rows[number] = random.integers(0, 256, len(engine.rows[0]), dtype="uint8")
            await engine.store(keys(*range(40)), range(40))
            await turn(agent, engine, chains=[keys(*range(40))])
            status, answer = await call(agent, "POST", f"{ALICE}/pin", {"ttl_s": 60})
            assert status == 507
            assert "half" in answer["error"]


async def test_an_exported_session_is_imported_elsewhere_under_any_name(tmp_path):
    async with (
        running_agent(settings(), tmp_path / "a.sock") as a,
        running_agent(settings(), tmp_path / "b.sock") as b,
        engine_with_session(a, tmp_path) as source,
    ):
        status, archive = await call(a, "GET", f"{ALICE}/export")
        assert status == 200
        damaged = bytearray(archive)
        damaged[-40] ^= 1
        for bad in (archive[:-1], bytes(damaged), b"nonsense"):
            assert (await call(b, "POST", "/v1/sessions/import", data=bad))[0] == 400
            assert (await call(b, "GET", ALICE))[0] == 404
        status, shown = await call(
            b, "POST", "/v1/sessions/import?tenant=lab&session_id=x", data=archive
        )
        assert (status, shown["tenant"], shown["session_id"]) == (200, "lab", "x")
        assert (await call(b, "POST", "/v1/sessions/import", data=archive))[0] == 200
        assert (await call(b, "POST", "/v1/sessions/import", data=archive))[0] == 409
        with SimulatedEngine(tmp_path / "b.sock") as there:
            await there.connected()
            await loads_everything(there, source)


async def test_a_parked_session_needs_no_memory_and_survives_a_restart(tmp_path):
    folder = tmp_path / "parked"
    config = settings(parking_folder=str(folder))
    async with (
        running_agent(config, tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path) as source,
    ):
        status, parked = await call(agent, "POST", f"{ALICE}/park")
        assert (status, parked["parked"], num_held(agent)) == (200, True, 0)
        assert len(list(folder.iterdir())) == 1
        (folder / "half.part").write_bytes(b"half")
        (folder / "other.mcps").write_bytes(b"MCPS\x01 damaged")
        payloads = source
        async with running_agent(config, tmp_path / "b.sock") as again:
            assert not (folder / "half.part").exists()
            (known,) = (await call(again, "GET", "/v1/sessions"))[1]["sessions"]
            assert (known["session_id"], known["parked"]) == ("alice", True)
            status, woken = await call(again, "POST", f"{ALICE}/wake")
            assert (status, woken["parked"], woken["held_chunks"]) == (200, False, 4)
            # Memory does not outlive the process: the file goes when the session does.
            assert len(list(folder.glob("[!o]*.mcps"))) == 1
            with SimulatedEngine(tmp_path / "b.sock") as there:
                await there.connected()
                await loads_everything(there, payloads)


async def test_what_would_be_too_much_is_not_parked_and_stays_as_it_is(tmp_path):
    tenants = {"quotas": [{"tenant": "small", "parked_bytes": 10_000}]}
    config = settings(parking_folder=tmp_path / "parked", tenants=tenants)
    async with running_agent(config, tmp_path / "a.sock") as agent:
        for tenant in ("small", "default"):
            async with engine_with_session(agent, tmp_path, tenant=tenant):
                pass
        status, answer = await call(agent, "POST", "/v1/sessions/small/alice/park")
        assert (status, "the tenant's parked sessions" in answer["error"]) == (507, True)
        assert not list((tmp_path / "parked").iterdir())
        shown = (await call(agent, "GET", "/v1/sessions/small/alice"))[1]
        assert (shown["parked"], shown["held_chunks"]) == (False, 4)
        assert (await call(agent, "POST", f"{ALICE}/park"))[0] == 200
        assert (await call(agent, "POST", f"{ALICE}/wake"))[0] == 200
        assert (await call(agent, "POST", f"{ALICE}/park"))[0] == 200, "counted once"


async def test_parking_needs_a_folder(tmp_path):
    async with (
        running_agent(settings(), tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path),
    ):
        status, answer = await call(agent, "POST", f"{ALICE}/park")
        assert status == 409
        assert "agent.parking_folder" in answer["error"]


async def test_a_session_can_be_fetched_before_its_request_comes(tmp_path):
    async with two_agents(tmp_path) as (a, b, _), engine_with_session(a, tmp_path):
        status, fetched = await call(b, "POST", f"{ALICE}/prefetch")
        assert (status, fetched["num_sent"]) == (200, 4)
        assert (await call(b, "POST", "/v1/sessions/default/nobody/prefetch"))[0] == 404


async def test_who_else_has_a_session_and_how_far_is_known_without_asking(tmp_path):
    async with two_agents(tmp_path) as (a, b, link), engine_with_session(a, tmp_path) as engine:
        await call(a, "POST", f"{ALICE}/copy", {"to": address(b)})
        await turn(a, engine)
        await until(lambda: held_elsewhere(b), "the news")
        shown = (await call(b, "GET", ALICE))[1]
        assert (shown["turns"], shown["holders"]) == (
            1,
            [{"peer": link.address, "turns": 2, "num_tokens": 48}],
        )
        await call(a, "DELETE", ALICE)
        await until(lambda: not held_elsewhere(b), "the news")
        assert (await call(b, "GET", ALICE))[1]["holders"] == []


def held_elsewhere(agent) -> bool:
    known = agent._peers.holders_of(SessionKey("default", "alice"))
    return any(state.turns == 2 for _, state in known)


async def test_sessions_are_listed_page_by_page_each_once(tmp_path):
    async with running_agent(settings(), tmp_path / "a.sock") as agent:
        async with engine_with_session(agent, tmp_path, session_id="0") as engine:
            for number in range(1, 7):
                await turn(agent, engine, f"{number}/ä?")
        path, seen = "/v1/sessions?limit=3", []
        while path:
            listed = (await call(agent, "GET", path))[1]
            seen += [each["session_id"] for each in listed["sessions"]]
            path = "next" in listed and f"/v1/sessions?limit=3&after={quote(listed['next'])}"
        assert seen == ["0", *(f"{number}/ä?" for number in range(1, 7))]
        for bad in ("limit=0", "limit=x", "limit=1001", "after=%00"):
            assert (await call(agent, "GET", f"/v1/sessions?{bad}"))[0] == 400


async def test_a_drained_agent_has_nothing_left(tmp_path):
    async with two_agents(tmp_path) as (a, b, _), engine_with_session(a, tmp_path) as engine:
        await turn(a, engine, "bob")
        status, lines = await call(a, "POST", "/v1/drain")
        steps = [json.loads(line) for line in lines.splitlines()]
        assert status == 200
        assert [(s["session_id"], s["to"], s["error"]) for s in steps] == [
            ("alice", address(b), ""),
            ("bob", address(b), ""),
        ]
        assert len(a._context.sessions) == num_held(a) == 0
        assert len((await call(b, "GET", "/v1/sessions"))[1]["sessions"]) == 2


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", f"{ALICE}/copy", {"to": "127.0.0.1:1"}, 404),
        ("POST", f"{ALICE}/copy", {"too": "127.0.0.1:1"}, 400),
        ("POST", f"{ALICE}/pin", {"ttl_s": -1}, 400),
        ("POST", f"{ALICE}/pin", {"ttl_s": "long"}, 400),
        ("POST", f"{ALICE}/fork", {"new_id": ""}, 400),
        ("GET", "/v1/sessions/default/%00", None, 400),
        ("GET", "/v1/sessions/default/..%2F..%2Fetc", None, 404),
        ("DELETE", "/v1/sessions/other/alice", None, 404),
        ("POST", "/v1/drain", None, 409),
    ],
)
async def test_what_cannot_be_done_is_said(tmp_path, method, path, body, status):
    async with (
        running_agent(settings(), tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path),
    ):
        answered, answer = await call(agent, method, path, body)
        assert answered == status, answer
        assert answer["error"]
        assert num_held(agent) == 4
