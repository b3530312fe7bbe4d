"""`mcp-vllm peers`, against a real agent and against none."""

import asyncio
import json

from simulated import address, running_agent, settings, until
from typer.testing import CliRunner, Result

from mcp_vllm.cli.main import app


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, ["peers", *args])


async def test_peers_are_shown_as_a_table_and_as_json(tmp_path):
    async with running_agent(settings("127.0.0.1:9"), tmp_path / "a.sock") as agent:
        await until(lambda: next(iter(agent._peers)).is_down, "the link to notice")
        as_json = await asyncio.to_thread(invoke, "--json", "--agent", address(agent))
        report = json.loads(as_json.stdout)
        (peer,) = report["peers"]
        assert peer["loads"] == report["store"]
        assert (peer["loads"]["loaded"], peer["loads"]["predicted_actual"]) == (0, None)
        assert (peer["name"], peer["up"], peer["mb_s"]) == ("127.0.0.1:9", False, None)
        assert (peer["directory"], peer["chunks"]) == ("down", 0)
        table = await asyncio.to_thread(invoke, "--agent", address(agent))
        assert "127.0.0" in table.stdout
        assert "measured" in table.stdout
        assert "own store" in table.stdout
        assert "the engine computes a prompt at: not measured" in table.stdout


async def test_an_agent_without_peers_says_so(tmp_path):
    async with running_agent(settings(), tmp_path / "a.sock") as agent:
        result = await asyncio.to_thread(invoke, "--agent", address(agent))
        assert "has no peers" in result.stdout


def test_no_agent_is_one_line_that_says_what_to_do():
    result = invoke("--agent", "127.0.0.1:9")
    assert result.exit_code == 1
    assert "no agent answers at 127.0.0.1:9" in result.output
    assert "--agent" in result.output


def test_an_impossible_address_is_named():
    result = invoke("--agent", "nowhere")
    assert result.exit_code == 1
    assert "nowhere" in result.output
