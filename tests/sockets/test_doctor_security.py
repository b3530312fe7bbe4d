"""Doctor: agents that want to know who asks are asked as their peers ask them."""

import asyncio
from dataclasses import replace

from simulated import address, running_agent
from simulated_security import SecuredSettings, tls_files

from mcp_vllm.doctor.agent_start import ask_health, check_listen
from mcp_vllm.doctor.check import Status
from mcp_vllm.doctor.peers import check_peers


async def test_peers_are_asked_over_tls_and_a_stranger_is_told_so(tmp_path):
    ours = SecuredSettings(tls=tls_files(tmp_path / "ours"), audit_file=tmp_path / "audit")
    theirs = SecuredSettings(tls=tls_files(tmp_path / "theirs"))
    async with running_agent(ours.config(), tmp_path / "a.sock") as agent:
        own = ours.config(address(agent), listen=address(agent))
        (verdict,) = await asyncio.to_thread(check_peers, own)
        assert verdict.found == "that is this host's own agent"  # so it was reached
        assert (await asyncio.to_thread(ask_health, own))["status"] == "ok"
        assert (await asyncio.to_thread(check_listen, own)).status is Status.OK
        stranger = theirs.config(address(agent), listen=address(agent))
        (verdict,) = await asyncio.to_thread(check_peers, stranger)
        assert "certificate" in verdict.found.lower()


def test_a_certificate_that_is_not_there_is_a_fail_that_names_it(tmp_path):
    files = tls_files(tmp_path)
    gone = SecuredSettings(tls=replace(files, certificate=tmp_path / "gone.pem"))
    (verdict,) = check_peers(gone.config("127.0.0.1:9"))
    assert verdict.status is Status.FAIL
    assert "gone.pem" in verdict.found
