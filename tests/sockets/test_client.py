"""The Python clients and the sessions command, against real agents."""

import asyncio
import json

import aiohttp
import pytest
from simulated import address, running_agent, settings
from simulated_sessions import engine_with_session, two_agents
from typer.testing import CliRunner

from mcp_vllm import AsyncMCPClient, MCPClient
from mcp_vllm.cli.main import app
from mcp_vllm.client import ApiError


async def test_both_clients_do_the_same(tmp_path):
    folder = tmp_path / "parked"
    async with (
        two_agents(tmp_path, parking_folder=str(folder)) as (a, b, _),
        engine_with_session(a, tmp_path),
    ):
        url, target = f"http://{address(a)}", address(b)

        def use(client: MCPClient):
            with client:
                assert [each.session_id for each in client.sessions()] == ["alice"]
                assert client.fork("alice", "bob").held_chunks == 4
                assert client.pin("bob", 60).pinned_until_s
                assert client.unpin("bob").pinned_until_s is None
                assert client.park("bob").parked
                assert not client.wake("bob").parked
                client.export("bob", tmp_path / "bob")
                client.delete("bob")
                assert client.import_file(tmp_path / "bob", "carol").session_id == "carol"
                assert client.copy("carol", to=target).num_sent == 4
                assert client.move("carol", to=target).num_sent == 0
                assert client.prefetch("carol").num_sent == 0
                with pytest.raises(ApiError, match="no such session") as caught:
                    client.session("bob")
                assert caught.value.status == 404

        await asyncio.to_thread(use, MCPClient(url))
        async with AsyncMCPClient(url) as client:
            assert {each.session_id for each in await client.sessions()} == {"alice", "carol"}
            assert (await client.fork("alice", "dave")).held_chunks == 4
            assert (await client.pin("dave", 60)).pinned_until_s
            assert (await client.unpin("dave")).pinned_until_s is None
            assert (await client.park("dave")).parked
            assert not (await client.wake("dave")).parked
            await client.export("dave", tmp_path / "dave")
            await client.delete("dave")
            assert (await client.import_file(tmp_path / "dave", "erin")).session_id == "erin"
            assert (await client.copy("erin", to=target)).num_sent == 0
            assert (await client.move("erin", to=target)).num_sent == 0
            assert (await client.prefetch("erin")).num_sent == 0
            assert (await client.session("erin")).turns == 1
            assert {step.to async for step in client.drain()} == {target}
            assert not await client.sessions()


async def test_an_interrupted_export_is_completed_and_a_changed_one_refused(tmp_path):
    async with running_agent(settings(), tmp_path / "a.sock") as agent:
        url = f"http://{address(agent)}"
        async with engine_with_session(agent, tmp_path), AsyncMCPClient(url) as client:
            whole, path = tmp_path / "whole", tmp_path / "resumed"
            await client.export("alice", whole)
            part, tag = tmp_path / "resumed.part", tmp_path / "resumed.tag"
            await client.fork("alice", "other")
            await client.export("alice", path)
            assert path.read_bytes() == whole.read_bytes()
            path.unlink()
            async with (
                aiohttp.ClientSession() as http,
                http.get(f"http://{address(agent)}/v1/sessions/default/alice/export") as got,
            ):
                etag = got.headers["ETag"]
            for size in (1, 1000, whole.stat().st_size - 5):
                part.write_bytes(whole.read_bytes()[:size])
                tag.write_text(etag)
                await client.export("alice", path)
                assert path.read_bytes() == whole.read_bytes()
                assert not part.exists()
            part.write_bytes(b"of another session")
            tag.write_text('"0123"')
            with pytest.raises(ApiError, match="changed"):
                await client.export("alice", path)


def test_an_agent_that_is_not_there_is_an_error_of_ours():
    with MCPClient("http://127.0.0.1:9") as client, pytest.raises(ApiError) as caught:
        client.sessions()
    assert caught.value.status == 0


async def test_the_command_line_does_what_it_says(tmp_path):
    folder = tmp_path / "parked"
    async with (
        two_agents(tmp_path, parking_folder=str(folder)) as (a, b, _),
        engine_with_session(a, tmp_path),
    ):

        async def run(*args: str):
            options = ["sessions", "--agent", address(a)]
            return await asyncio.to_thread(CliRunner().invoke, app, [*options, *args])

        assert "alice" in (await run("list")).stdout
        (listed,) = json.loads((await run("list", "--json")).stdout)
        assert listed["held_chunks"] == 4
        for args, said in (
            (("fork", "alice", "bob"), "shares"),
            (("pin", "bob", "--ttl", "30m"), "pinned until"),
            (("unpin", "bob"), ""),
            (("export", "bob", str(tmp_path / "file")), "wrote"),
            (("import", str(tmp_path / "file"), "--as", "carol"), "carol is here"),
            (("park", "bob"), "parked"),
            (("wake", "bob"), "awake"),
            (("copy", "alice", address(b)), "4 of 4 chunks sent"),
            (("move", "bob", address(b)), "0 of 4 chunks sent"),
            (("prefetch", "bob"), "is here"),
            (("show", "bob"), '"num_tokens": 48'),
            (("delete", "bob"), ""),
            (("drain",), "every session has moved"),
        ):
            result = await run(*args)
            assert result.exit_code == 0, (args, result.output)
            assert said in result.stdout.replace("\n", " "), (args, result.stdout)
        for args, said in (
            (("show", "bob"), "no such session"),
            (("pin", "bob", "--ttl", "soon"), "soon"),
            (("drain",), "moved"),
        ):
            assert said in (await run(*args)).output


def test_no_agent_is_one_line(tmp_path):
    result = CliRunner().invoke(app, ["sessions", "--agent", "127.0.0.1:9", "list"])
    assert result.exit_code == 1
    assert "--agent" in result.output
