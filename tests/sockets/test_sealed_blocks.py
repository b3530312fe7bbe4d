"""Sealed blocks on whole agents: on the wire, in files, and where nobody can read them."""

from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import xxhash
from simulated import (
    SimulatedEngine,
    SimulatedPeer,
    acquainted,
    address,
    good_frame,
    has_all,
    http_head,
    key,
    keys,
    metric,
    running_agent,
    send_frame,
    until,
)
from simulated_security import SecuredSettings, audit_lines, seal_keys
from simulated_sessions import ALICE, NAMES, call, engine_with_session
from throttle import Throttle

from mcp_vllm.agent import wire
from mcp_vllm.link import protocol
from mcp_vllm.security.seals import Seals, is_sealed, key_id_of
from mcp_vllm.session.manifest import SessionKey
from mcp_vllm.store.ram import ChunkKey

SOMEWHERE = [20, 21, 22, 23]


@asynccontextmanager
async def chain_of_agents(folder, *configs: tuple[SecuredSettings, dict]):
    """Agents a, b, c, ...: each is a peer of its neighbours."""
    async with AsyncExitStack() as stack:
        links = [Throttle("127.0.0.1:1", 1e9) for _ in configs]
        for link in links:
            await stack.enter_async_context(link.running())
        agents = []
        for number, (secured, more) in enumerate(configs):
            around = [n for n in (number - 1, number + 1) if 0 <= n < len(configs)]
            config = secured.config(*(links[n].address for n in around), **more)
            name = "abc"[number]
            agent = await stack.enter_async_context(running_agent(config, folder / f"{name}.sock"))
            links[number].set_target(address(agent))
            agents.append(agent)
        await acquainted(*agents)
        yield agents, [link.address for link in links]


@asynccontextmanager
async def engine_at(folder, name: str):
    with SimulatedEngine(folder / f"{name}.sock") as engine:
        await engine.connected()
        yield engine


def stored(agent) -> dict[ChunkKey, bytes]:
    store = agent._context.store
    chunks = {name: store.get(name) for name in store}
    return {name: chunk.frame for name, chunk in chunks.items() if chunk.frame is not None}


async def all_encoded(agent) -> None:
    await until(lambda: agent._context.store.next_raw() is None, "the encoder")


async def loads_everything(engine, source) -> None:
    engine.prepare("check")
    await engine.finds("check", NAMES)
    assert not (await engine.load("check", NAMES, SOMEWHERE)).failed
    for index, group in enumerate((0, 0, 0, 1)):
        assert engine.payload(20 + index, group) == source.payload(index, group)
    engine.link.send(protocol.Finish("check", [], 0))


async def test_blocks_leave_sealed_and_are_used_where_the_key_is(tmp_path):
    ours = SecuredSettings(seal_keys=seal_keys(tmp_path, "a"))
    async with (
        chain_of_agents(tmp_path, (ours, {}), (ours, {})) as ((a, b), _),
        engine_with_session(a, tmp_path) as source,
        engine_at(tmp_path, "b") as there,
    ):
        await all_encoded(a)
        assert all(is_sealed(frame) for frame in stored(a).values())
        await loads_everything(there, source)
        assert stored(b).keys() == stored(a).keys()
        assert all(is_sealed(frame) for frame in stored(b).values())
        # From its own store, too.
        await loads_everything(there, source)


@pytest.mark.parametrize("codec", ["raw", "zstd", "lossless"])
async def test_a_codec_of_the_link_is_sealed_as_well(tmp_path, codec):
    ours = SecuredSettings(seal_keys=seal_keys(tmp_path, "a"))
    async with (
        chain_of_agents(tmp_path, (ours, {"codecs": {"wire": codec}}), (ours, {})) as ((a, b), _),
        engine_at(tmp_path, "a") as here,
        engine_with_session(b, tmp_path, "b") as source,
    ):
        await all_encoded(b)
        await loads_everything(here, source)
        assert all(is_sealed(frame) for frame in stored(a).values())


async def test_an_agent_without_the_key_keeps_and_passes_on_what_it_cannot_read(tmp_path):
    """A cache between two agents that have the key: its own engine gets misses."""
    ours = SecuredSettings(seal_keys=seal_keys(tmp_path, "a"))
    blind = SecuredSettings()
    parked = {"parking_folder": tmp_path / "parked"}
    async with (
        chain_of_agents(tmp_path, (ours, {}), (blind, parked), (ours, {})) as (
            (a, cache, c),
            links,
        ),
        engine_with_session(a, tmp_path) as source,
        engine_at(tmp_path, "b") as engine_of_cache,
        engine_at(tmp_path, "c") as there,
    ):
        engine_of_cache.prepare("x")
        assert await engine_of_cache.lookup("x", NAMES) == [0] * 4, "the peer has it sealed"
        status, moved = await call(a, "POST", f"{ALICE}/move", {"to": links[1]})
        assert (status, moved["num_sent"]) == (200, 4)
        frames = stored(cache)
        assert len(frames) == 4
        assert all(is_sealed(frame) for frame in frames.values())
        assert await engine_of_cache.lookup("x", NAMES) == [0] * 4
        done = await engine_of_cache.load("x", NAMES, SOMEWHERE)
        assert done.failed == {0, 1, 2, 3}
        assert not any(engine_of_cache.inventory.values())
        # To disk and back, and on to one that can read it.
        assert (await call(cache, "POST", f"{ALICE}/park"))[0] == 200
        (file,) = (tmp_path / "parked").iterdir()
        assert source.payload(0)[:512] not in file.read_bytes()
        assert (await call(cache, "POST", f"{ALICE}/wake"))[1]["held_chunks"] == 4
        assert stored(cache) == frames
        await loads_everything(there, source)
        assert metric(cache, "mcp_agent_sent_chunks_total") == 4
        assert stored(c).keys() == frames.keys()


async def test_a_keyless_cache_that_has_no_engine_answers_lookups(tmp_path):
    ours = SecuredSettings(seal_keys=seal_keys(tmp_path, "a"))
    async with (
        chain_of_agents(tmp_path, (ours, {}), (SecuredSettings(), {}), (ours, {})) as (
            (a, cache, _),
            links,
        ),
        engine_at(tmp_path, "c") as there,
        engine_with_session(a, tmp_path) as source,
    ):
        assert (await call(a, "POST", f"{ALICE}/copy", {"to": links[1]}))[0] == 200
        assert not cache._context.fingerprints
        await loads_everything(there, source)


async def test_the_newest_key_seals_the_older_one_opens_and_a_retired_one_is_a_miss(tmp_path):
    both = SecuredSettings(seal_keys=seal_keys(tmp_path, "a", name="a.yaml"))
    audit = tmp_path / "audit"
    there = SecuredSettings(
        seal_keys=seal_keys(tmp_path, "b", "a", name="ba.yaml"), audit_file=audit
    )
    async with (
        chain_of_agents(tmp_path, (both, {}), (there, {})) as ((a, b), _),
        engine_with_session(a, tmp_path) as source,
        engine_at(tmp_path, "b") as engine,
    ):
        await loads_everything(engine, source)
        assert {key_id_of(frame) for frame in stored(b).values()} == {"a"}
        engine.fill(9, 9)
        await engine.store(keys(9), [9])
        await all_encoded(b)
        own = ChunkKey(next(iter(b._context.fingerprints)), keys(9)[0])
        assert key_id_of(stored(b)[own]) == "b"
        seal_keys(tmp_path, "b", name="ba.yaml")
        b._security.reload()
        engine.prepare("later")
        assert await engine.lookup("later", [*NAMES, *keys(9)]) == [0, 0, 0, 0, 1]
        await engine.told_of("default", keys(9))
        seal_keys(tmp_path, "b", "a", name="ba.yaml")
        b._security.reload()
        await engine.told_of("default", [*NAMES, *keys(9)])
    events = [each for each in audit_lines(audit) if each["event"] == "keys"]
    assert [(each["what"], each["result"]) for each in events] == [("seal keys", "replaced")] * 2


async def test_a_peers_frame_that_is_not_sealed_is_refused_where_a_key_says_it_must_be(tmp_path):
    ours = SecuredSettings(seal_keys=seal_keys(tmp_path, "a"))

    async def sends_plain(asked, writer):
        http_head(writer)
        for index, name in enumerate(asked):
            send_frame(writer, index, good_frame(name))
        send_frame(writer, wire.END_INDEX, b"")

    async with (
        SimulatedPeer(has_all, sends_plain) as peer,
        running_agent(ours.config(peer.name), tmp_path / "a.sock") as agent,
        engine_at(tmp_path, "a") as engine,
    ):
        engine.prepare("r")
        await engine.finds("r", NAMES)
        done = await engine.load("r", NAMES, SOMEWHERE)
        assert (done.failed, done.causes[0]) == ({0, 1, 2, 3}, "sealed")
        assert not stored(agent)
        assert metric(agent, "mcp_agent_peer_failures_total", peer=peer.name, cause="sealed") == 1


@pytest.mark.parametrize("replay", ["another chunk", "another tenant", "another engine", "lossy"])
async def test_a_sealed_block_replayed_as_something_else_reaches_no_engine(tmp_path, replay):
    """A peer with everything that was ever on the wire, and without the key."""
    path = seal_keys(tmp_path, "a")
    ours, outside = SecuredSettings(seal_keys=path), Seals(path)
    namespace: list[bytes] = []

    def sealed(name: bytes) -> bytes:
        number = int.from_bytes(name[:32], "big")
        if replay == "another chunk":
            other = key(number + 100)
            frame = outside.seal(good_frame(other), namespace[0], "default", "")
            return frame.replace(other, name)  # ... and the checksum made good
        if replay == "another tenant":
            return outside.seal(good_frame(name), namespace[0], "beta", "")
        if replay == "another engine":
            return outside.seal(good_frame(name), b"x" * 16, "default", "")
        frame = bytearray(outside.seal(good_frame(name), namespace[0], "default", "small"))
        frame[7] = 0
        return bytes(frame)

    async def replays(asked, writer):
        http_head(writer)
        for index, name in enumerate(asked):
            frame = sealed(name)
            frame = frame[:-8] + xxhash.xxh3_64_digest(frame[:-8])
            send_frame(writer, index, frame)
        send_frame(writer, wire.END_INDEX, b"")

    async with (
        SimulatedPeer(has_all, replays) as peer,
        running_agent(ours.config(peer.name), tmp_path / "a.sock") as agent,
        engine_at(tmp_path, "a") as engine,
    ):
        await until(lambda: agent._context.fingerprints, "the engine")
        namespace += agent._context.fingerprints
        engine.prepare("r")
        wanted = keys(0, 1, 2)
        await engine.finds("r", wanted)
        done = await engine.load("r", wanted, SOMEWHERE[:3])
        assert (done.failed, done.causes[0]) == ({0, 1, 2}, "sealed")
        assert not stored(agent)
        for chunk_id in SOMEWHERE[:3]:
            assert not engine.payload(chunk_id).strip(b"\0")


async def test_an_archive_is_sealed_and_becomes_another_tenants_only_where_the_key_is(tmp_path):
    ours = SecuredSettings(seal_keys=seal_keys(tmp_path, "a"))
    async with (
        chain_of_agents(tmp_path, (ours, {}), (SecuredSettings(), {})) as ((a, blind), _),
        engine_with_session(a, tmp_path) as source,
        engine_at(tmp_path, "a") as engine,
    ):
        _, archive = await call(a, "GET", f"{ALICE}/export")
        assert source.payload(0)[:512] not in archive
        as_other = "/v1/sessions/import?tenant=beta&session_id=x"
        status, refused = await call(blind, "POST", as_other, data=archive)
        assert (status, "which is not here" in refused["error"]) == (400, True)
        assert (await call(blind, "POST", "/v1/sessions/import", data=archive))[0] == 200
        assert (await call(a, "POST", as_other, data=archive))[0] == 200
        engine.prepare("r", tenant="beta")
        assert not (await engine.load("r", NAMES, SOMEWHERE, "beta")).failed
        assert engine.payload(20) == source.payload(0)
        own = {name: frame for name, frame in stored(a).items() if name.tenant == "beta"}
        assert len(own) == 4
        assert all(is_sealed(frame) for frame in own.values())


async def test_what_was_there_before_its_tenant_had_a_key_is_sealed_before_it_leaves(tmp_path):
    path = seal_keys(tmp_path, ("other", "other"))
    parked = {"parking_folder": tmp_path / "parked"}
    secured = SecuredSettings(seal_keys=path)
    async with (
        running_agent(secured.config(**parked), tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path) as source,
    ):
        await all_encoded(agent)
        assert not any(is_sealed(frame) for frame in stored(agent).values())
        seal_keys(tmp_path, "a")
        agent._security.reload()
        assert (await call(agent, "POST", f"{ALICE}/park"))[0] == 200
        (file,) = (tmp_path / "parked").iterdir()
        assert source.payload(0)[:512] not in file.read_bytes()
        assert b"MCPF" not in file.read_bytes()
        await call(agent, "POST", f"{ALICE}/wake")
        assert len(stored(agent)) == 4
        assert all(is_sealed(frame) for frame in stored(agent).values())


async def test_a_session_that_used_another_tenants_sealed_blocks_has_them_sealed_for_itself(
    tmp_path,
):
    ours = SecuredSettings(seal_keys=seal_keys(tmp_path, "a"))
    async with (
        running_agent(ours.config(), tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path, tenant="acme") as engine,
    ):
        await all_encoded(agent)
        engine.prepare("r", "s", "beta")
        engine.link.send(protocol.Finish("r", [NAMES[:3], NAMES[3:]], 48))
        await until(lambda: agent._context.sessions.get(SessionKey("beta", "s")), "the session")
        namespace = next(iter(agent._context.fingerprints))
        own = ChunkKey(namespace, NAMES[0], "beta")
        await until(lambda: own in agent._context.store, "the block as its own")
        frame = stored(agent)[own]
        opened = agent._context.seals.open(frame, namespace, "beta")
        assert opened == agent._context.seals.open(
            stored(agent)[ChunkKey(namespace, NAMES[0], "acme")], namespace, "acme"
        )


async def test_bad_keys_stop_the_start(tmp_path):
    path = seal_keys(tmp_path, "a")
    (tmp_path / "a.key").write_text("short")
    with pytest.raises(Exception, match=r"id a: a\.key must hold 64 hexadecimal digits"):
        async with running_agent(SecuredSettings(seal_keys=path).config(), tmp_path / "a.sock"):
            pass
