"""Why a block is kept or was evicted: route, client and command, against a real agent."""

import asyncio
import json

from simulated import SimulatedEngine, address, keys, running_agent, settings, until
from simulated_security import Issuer, SecuredSettings
from simulated_sessions import NAMES, engine_with_session, turn
from typer.testing import CliRunner, Result

from mcp_vllm import AsyncMCPClient
from mcp_vllm.cli.main import app
from mcp_vllm.client import ApiError
from mcp_vllm.link import protocol

MIB = 1 << 20


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, ["cache", "explain", *args])


async def refused(call) -> int:
    try:
        await call
    except ApiError as error:
        return error.status
    raise AssertionError("it was not refused")


async def test_a_session_is_explained_block_by_block_in_memory_and_on_disk(tmp_path):
    config = settings(disk={"path": tmp_path / "disk", "bytes": 64 * MIB})
    async with (
        running_agent(config, tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path) as engine,
        AsyncMCPClient(f"http://{address(agent)}") as client,
    ):
        await until(lambda: agent._context.tiers.disk.size().num_chunks == 4, "the disk")
        view = await client.explain_session("alice")
        assert [block.key for block in view.blocks] == [name.hex() for name in NAMES]
        for block in view.blocks:
            assert (block.memory.uses, block.memory.turn) == (1, 1)
            for seen in (block.memory, block.disk):
                assert (seen.held, seen.pinned) == (True, False)
                assert seen.score > 0
                assert seen.saved_ms > 0
        await turn(agent, engine)
        await client.pin("alice", 60)
        again = (await client.explain_session("alice")).blocks[0].memory
        assert (again.uses, again.turn, again.pinned) == (2, 2, True)
        one = await client.explain_block(NAMES[0].hex())
        assert [block.key for block in one.blocks] == [NAMES[0].hex()]


async def test_what_was_evicted_is_explained_beside_the_threshold(tmp_path):
    config = settings(ram_bytes=MIB)
    async with (
        running_agent(config, tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path),
        AsyncMCPClient(f"http://{address(agent)}") as client,
    ):
        with SimulatedEngine(tmp_path / "a.sock") as other:
            await other.connected()
            for number in range(100, 400):
                other.fill(0, number)
                (name,) = keys(number)
                await other.store([name], [0])
                other.prepare(f"r{number}")
                other.link.send(protocol.Finish(f"r{number}", [[name]], 16))
                if agent._context.store.evictions:
                    break
            await until(lambda: not agent._context.activity.busy_requests, "the requests")
        gone = [name for name in map(bytes, keys(*range(100, 400))) if _was_evicted(agent, name)]
        gone += [name for name in NAMES if _was_evicted(agent, name)]
        view = await client.explain_block(gone[0].hex())
        (block,) = view.blocks
        assert block.disk is None
        assert not block.memory.held
        assert block.memory.threshold > 0
        assert agent._context.store.policy.explain(_name(agent, gone[0])) is not None


def _name(agent, key: bytes):
    from mcp_vllm.store.ram import ChunkKey

    return ChunkKey(next(iter(agent._context.fingerprints)), key)


def _was_evicted(agent, key: bytes) -> bool:
    explanation = agent._context.store.policy.explain(_name(agent, key))
    return explanation is not None and not explanation.held


async def test_what_is_not_known_or_no_key_is_said(tmp_path):
    async with (
        running_agent(settings(), tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path),
        AsyncMCPClient(f"http://{address(agent)}") as client,
    ):
        assert await refused(client.explain_session("nobody")) == 404
        assert await refused(client.explain_block("ab" * 36)) == 404
        assert await refused(client.explain_block("no key")) == 400
        assert await refused(client.explain_block("ab")) == 400


async def test_it_takes_the_scope_admin_and_the_tenant_s_own_token(tmp_path):
    issuer = Issuer(tmp_path)
    config = SecuredSettings(token_keys=issuer.file).config()
    async with (
        running_agent(config, tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path, tenant="acme"),
    ):

        async def status(token: str, tenant: str = "acme") -> tuple[int, int]:
            async with AsyncMCPClient(f"http://{address(agent)}", tenant, token) as client:
                asked = (client.explain_session("alice"), client.explain_block(NAMES[0].hex()))
                return tuple([await _status(each) for each in asked])

        assert await status(issuer.token("admin")) == (200, 200)
        assert await status(issuer.token("admin", tenant="acme")) == (200, 200)
        assert await status(issuer.token("admin", tenant="other")) == (404, 404)
        assert await status(issuer.token("sessions:read", tenant="acme")) == (403, 403)


async def _status(call) -> int:
    try:
        await call
    except ApiError as error:
        return error.status
    return 200


async def test_the_command_takes_a_session_or_a_key(tmp_path):
    async with (
        running_agent(settings(), tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path),
    ):
        where = ("--agent", address(agent))
        table = await asyncio.to_thread(invoke, "alice", *where)
        assert table.exit_code == 0, table.output
        for word in ("memory", "kept", "limit"):
            assert word in table.stdout
        one = await asyncio.to_thread(invoke, NAMES[1].hex(), *where)
        assert "hazard" in one.stdout
        assert "tail=" in one.stdout
        for what in ("alice", NAMES[1].hex()):
            printed = await asyncio.to_thread(invoke, what, "--json", *where)
            blocks = json.loads(printed.stdout)["blocks"]
            assert NAMES[1].hex() in [block["key"] for block in blocks]
        missing = await asyncio.to_thread(invoke, "nobody", *where)
        assert missing.exit_code == 1
        assert "no such session" in missing.output
