"""Agents that know each other by certificate, over real TLS connections."""

import asyncio
import shutil
import ssl
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest
from simulated import SimulatedEngine, address, running_agent, until
from simulated_security import Issuer, SecuredSettings, audit_lines, tls_files
from simulated_sessions import ALICE, NAMES, engine_with_session
from throttle import Throttle

from mcp_vllm.agent.access_rules import rule_for
from mcp_vllm.security.tls import TlsFiles, client_context


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> TlsFiles:
    return tls_files(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory) -> TlsFiles:
    return tls_files(tmp_path_factory.mktemp("theirs"))


def context_of(files: TlsFiles, ca=None) -> ssl.SSLContext:
    return client_context(ca or files.ca, files.certificate, files.key)


async def call(agent, method, path, context, token=None, body=None):
    """(Status, body)."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with (
        aiohttp.ClientSession() as http,
        http.request(
            method, f"https://{address(agent)}{path}", ssl=context, json=body, headers=headers
        ) as response,
    ):
        return response.status, await response.read()


@asynccontextmanager
async def two_secured_agents(folder, ours: SecuredSettings, theirs: SecuredSettings):
    """(A, B), peers of each other."""
    async with AsyncExitStack() as stack:
        link = Throttle("127.0.0.1:1", 1e9)
        await stack.enter_async_context(link.running())
        b = await stack.enter_async_context(
            running_agent(theirs.config(link.address), folder / "b.sock")
        )
        a = await stack.enter_async_context(
            running_agent(ours.config(address(b)), folder / "a.sock")
        )
        link.set_target(address(a))
        yield a, b


async def test_a_session_moves_between_two_agents_and_an_engine_loads_it(tmp_path, files):
    ours = SecuredSettings(tls=files, audit_file=tmp_path / "audit-a")
    theirs = SecuredSettings(tls=files, audit_file=tmp_path / "audit-b")
    async with (
        two_secured_agents(tmp_path, ours, theirs) as (a, b),
        engine_with_session(a, tmp_path),
    ):
        operator = context_of(files)
        status, _ = await call(a, "POST", f"{ALICE}/move", operator, body={"to": address(b)})
        assert status == 200
        assert (await call(a, "GET", ALICE, operator))[0] == 404
        with SimulatedEngine(tmp_path / "b.sock") as engine:
            await engine.connected()
            engine.prepare("check")
            assert await engine.lookup("check", NAMES) == [1] * 4
    served = [each for each in audit_lines(tmp_path / "audit-a") if each["event"] == "blocks"]
    assert served
    assert {each["who"] for each in served} == {"certificate:127.0.0.1"}
    assert sum(each["bytes"] for each in served) > 10_000


async def test_with_tokens_a_certificate_reads_blocks_and_nothing_else(tmp_path, files):
    issuer = Issuer(tmp_path)
    chosen = SecuredSettings(tls=files, token_keys=issuer.file)
    async with (
        two_secured_agents(tmp_path, chosen, chosen) as (a, b),
        engine_with_session(a, tmp_path),
    ):
        context = context_of(files)
        assert (await call(a, "GET", "/v1/hello", context))[0] == 200
        assert (await call(a, "GET", "/v1/sessions", context))[0] == 403
        assert (await call(a, "DELETE", ALICE, context))[0] == 403
        token = issuer.token("sessions:write", tenant="default")
        plain = client_context(files.ca)
        body = {"to": address(b)}
        assert (await call(a, "POST", f"{ALICE}/move", plain, token, body))[0] == 200


async def test_a_bad_token_is_not_made_up_for_by_a_good_certificate(tmp_path, files):
    config = SecuredSettings(tls=files, token_keys=Issuer(tmp_path).file).config()
    async with running_agent(config, tmp_path / "a.sock") as agent:
        assert (await call(agent, "GET", "/v1/hello", context_of(files), "x"))[0] == 401


async def test_an_agent_presents_its_token_and_a_new_one_when_it_is_replaced(tmp_path, files):
    issuer = Issuer(tmp_path)
    own = tmp_path / "own"
    own.write_text(issuer.token("blocks:read", exp=1))
    chosen = SecuredSettings(tls=files, token_keys=issuer.file, own_token_file=own)
    async with two_secured_agents(tmp_path, chosen, chosen) as (a, _):
        (peer,) = a._peers
        with pytest.raises(Exception, match="a valid token"):
            await peer.hello()
        own.write_text(issuer.token("blocks:read"))
        a._security.reload()
        assert (await peer.hello()).agent_id


async def test_no_certificate_or_another_cas_gets_nothing(tmp_path, files, strangers, caplog):
    audit = tmp_path / "audit"
    config = SecuredSettings(tls=files, audit_file=audit).config()
    async with running_agent(config, tmp_path / "a.sock") as agent:
        plain = client_context(files.ca)
        assert (await call(agent, "GET", "/healthz", plain))[0] == 200
        assert (await call(agent, "GET", "/v1/hello", plain))[0] == 401
        with pytest.raises((aiohttp.ClientError, OSError)):
            await call(agent, "GET", "/v1/hello", context_of(strangers, files.ca))
        await until(lambda: len(audit_lines(audit)) >= 2, "the refusals")
    reasons = {each["reason"] for each in audit_lines(audit)}
    assert reasons == {"no credentials", "TLS: CERTIFICATE_VERIFY_FAILED"}
    assert all(reason in caplog.text for reason in reasons)


async def test_a_peer_with_another_cas_certificate_is_not_trusted(tmp_path, files, strangers):
    ours, theirs = SecuredSettings(tls=files), SecuredSettings(tls=strangers)
    async with two_secured_agents(tmp_path, ours, theirs) as (a, _):
        (peer,) = a._peers
        with pytest.raises(Exception, match="certificate"):
            await peer.hello()


async def test_tls_1_2_and_plain_http_are_refused(tmp_path, files):
    audit = tmp_path / "audit"
    config = SecuredSettings(tls=files, audit_file=audit).config()
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(files.ca)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with running_agent(config, tmp_path / "a.sock") as agent:
        with pytest.raises(aiohttp.ClientError):
            await call(agent, "GET", "/healthz", old)
        reader, writer = await asyncio.open_connection("127.0.0.1", agent.port)
        writer.write(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert b"HTTP/1" not in await reader.read()
        writer.close()
        await until(lambda: "HTTP_REQUEST" in audit.read_text(), "the refusals")
    reasons = {each["reason"] for each in audit_lines(audit)}
    assert reasons == {"TLS: UNSUPPORTED_PROTOCOL", "TLS: HTTP_REQUEST"}


async def test_a_replaced_certificate_is_used_without_a_restart(tmp_path, strangers):
    tls_files(tmp_path / "used")
    used = TlsFiles(*(tmp_path / "used" / f"127.0.0.1{end}.pem" for end in ("", "-key")),
                    tmp_path / "used" / "ca.pem")  # fmt: skip
    before, after = context_of(used), context_of(strangers)
    audit = tmp_path / "audit"
    config = SecuredSettings(tls=used, audit_file=audit).config()
    async with running_agent(config, tmp_path / "a.sock") as agent:
        assert (await call(agent, "GET", "/v1/hello", before))[0] == 200
        shutil.copy(strangers.certificate, used.certificate)
        agent._security.reload()
        assert (await call(agent, "GET", "/v1/hello", before))[0] == 200
        shutil.copy(strangers.key, used.key)
        shutil.copy(strangers.ca, used.ca)
        agent._security.reload()
        assert (await call(agent, "GET", "/v1/hello", after))[0] == 200
        with pytest.raises(aiohttp.ClientError):
            await call(agent, "GET", "/v1/hello", before)
    results = [each["result"] for each in audit_lines(audit) if each["event"] == "keys"]
    assert results == ["failed", "replaced"]


async def test_files_that_cannot_be_used_stop_the_start(tmp_path, files):
    broken = TlsFiles(files.certificate, files.ca, files.ca)
    with pytest.raises(Exception, match=r"certificate .* with key"):
        async with running_agent(SecuredSettings(tls=broken).config(), tmp_path / "a.sock"):
            pass


def test_a_route_without_a_rule_is_for_admin_alone():
    assert rule_for("POST", "/v1/new").scope == "admin"
    assert rule_for("HEAD", "/metrics") == rule_for("GET", "/metrics")
