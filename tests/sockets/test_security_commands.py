"""`mcp-vllm certs`, `mcp-vllm token`, and the options that say who a command is."""

import asyncio
import json

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from simulated import address, running_agent
from simulated_security import Issuer, SecuredSettings, private_pem
from simulated_sessions import engine_with_session
from typer.testing import CliRunner, Result

from mcp_vllm import AsyncMCPClient, MCPClient
from mcp_vllm.cli.main import app
from mcp_vllm.client import ApiError
from mcp_vllm.security.tls import TlsFiles, client_context
from mcp_vllm.security.tokens import TokenVerifier


def invoke(*args: object, **env: str) -> Result:
    return CliRunner().invoke(app, [str(each) for each in args], env=env)


@pytest.fixture
def pki(tmp_path) -> TlsFiles:
    folder = tmp_path / "pki"
    made = invoke("certs", folder, "127.0.0.1", "localhost")
    assert made.exit_code == 0, made.output
    assert len(made.stdout.split()) == 4
    return TlsFiles(folder / "127.0.0.1.pem", folder / "127.0.0.1-key.pem", folder / "ca.pem")


def mint(tmp_path, issuer: Issuer, *args: str) -> Result:
    key = tmp_path / "signing.pem"
    key.write_bytes(private_pem(issuer.key))
    return invoke("token", "--key", key, "--kid", issuer.kid, "--sub", "ann", *args)


def test_certs_overwrites_nothing(pki):
    again = invoke("certs", pki.ca.parent, "127.0.0.1")
    assert again.exit_code == 1
    assert "not overwritten" in again.output
    assert load_pem_private_key(pki.key.read_bytes(), None)


def test_token_prints_a_token_or_says_why_not(tmp_path):
    issuer = Issuer(tmp_path)
    good = mint(tmp_path, issuer, "--scope", "admin sessions:read", "--ttl", "2m")
    verifier = TokenVerifier(issuer.file, "mcp-vllm", 0)
    assert verifier.verify(good.stdout.strip()).name == "token:ann"
    bad = mint(tmp_path, issuer, "--scope", "sessions:read")
    assert (bad.exit_code, bad.output) == (1, "token refused: neither a tenant nor admin\n")


async def test_the_commands_and_clients_present_what_they_were_given(tmp_path, pki):
    issuer = Issuer(tmp_path)
    config = SecuredSettings(tls=pki, token_keys=issuer.file).config("127.0.0.1:9")
    token = tmp_path / "token"
    token.write_text(issuer.token("sessions:read", tenant="default"))
    async with (
        running_agent(config, tmp_path / "a.sock") as agent,
        engine_with_session(agent, tmp_path),
    ):
        name, plain = f"{address(agent)}", {"MCP_VLLM_TOKEN": ""}
        sessions = ("sessions", "--agent", name, "--ca", pki.ca)
        with_file = await asyncio.to_thread(
            invoke, *sessions, "--token-file", token, "list", "--json", **plain
        )
        assert [each["session_id"] for each in json.loads(with_file.stdout)] == ["alice"]
        with_variable = await asyncio.to_thread(
            invoke, *sessions, "list", "--json", MCP_VLLM_TOKEN=token.read_text()
        )
        # The sizes may differ: chunks are encoded meanwhile.
        (listed,) = json.loads(with_variable.stdout)
        assert (listed["session_id"], listed["num_tokens"]) == ("alice", 48)
        without = await asyncio.to_thread(invoke, *sessions, "list", **plain)
        assert "a valid token or certificate" in without.output
        peers = ("peers", "--agent", name, "--ca", pki.ca, "--cert", pki.certificate)
        shown = await asyncio.to_thread(
            invoke, *peers, "--key", pki.key, "--token-file", token, "--json"
        )
        assert [each["name"] for each in json.loads(shown.stdout)["peers"]] == ["127.0.0.1:9"]
        refused = await asyncio.to_thread(invoke, *peers, "--key", pki.key, **plain)
        assert "says 403" in refused.output
        url, context = f"https://{name}", client_context(pki.ca)
        with MCPClient(url, token=token.read_text(), verify=context) as client:
            assert await asyncio.to_thread(client.session, "alice")
        async with AsyncMCPClient(url, verify=context) as client:
            with pytest.raises(ApiError) as caught:
                await client.session("alice")
            assert caught.value.status == 401


def test_a_token_does_not_travel_in_the_clear(tmp_path):
    (tmp_path / "token").write_text("secret-token")
    result = invoke(
        "sessions", "--agent", "192.0.2.1:7077", "--token-file", tmp_path / "token", "list"
    )
    assert result.exit_code == 1
    assert "over TLS only" in result.output
    assert "secret-token" not in result.output
