"""The peers, configured or discovered: reachable, of our version, quick enough, and compatible with
our engines.

Compatibility can be told only when the local agent runs and an engine has connected to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from mcp_vllm.agent import wire
from mcp_vllm.agent.discovery import Resolver
from mcp_vllm.agent.lookups import LOOKUP_SHARE
from mcp_vllm.agent.peer_http import Member
from mcp_vllm.agent.registry import Registry
from mcp_vllm.agent.security import AgentSecurity
from mcp_vllm.config import Address, Config
from mcp_vllm.doctor.agent_start import reachable_listen
from mcp_vllm.doctor.check import Check, fail, ok, warn
from mcp_vllm.security.errors import SecurityError
from mcp_vllm.session.fingerprint import Fingerprint
from mcp_vllm.store.shared import RedisSetupError
from mcp_vllm.store.shared.client import redis_faults

DEADLINE_S = 2.0


@dataclass(frozen=True)
class Answer:
    """A peer's hello and how long a second one took on the warm connection; or the fault."""

    hello: wire.PeerHello | None = None
    round_trip_ms: float = 0.0
    fault: str = ""


def check_peers(config: Config, deadline_s: float = DEADLINE_S) -> list[Check]:
    """One check a peer, and one a source of peers; all peers are asked at once."""
    if not config.seeks_peers:
        return [ok("peers", "none configured: contexts stay on this host")]
    try:
        # The audit is the agent's to write.
        security = AgentSecurity(config.security.model_copy(update={"audit_file": None}))
    except SecurityError as error:
        return [
            fail("security", str(error), "mend the file, or name another one: docs/security.md")
        ]
    return asyncio.run(_check_all(config, security, deadline_s))


async def _check_all(config: Config, security: AgentSecurity, deadline_s: float) -> list[Check]:
    configured = [Member(name) for name in config.peers]
    checks, discovered = await _discover(config, deadline_s)
    local = Member(str(reachable_listen(config)))
    members = list(dict.fromkeys([*configured, *discovered]))
    async with aiohttp.ClientSession() as http:
        own, *answers = await asyncio.gather(
            *(_ask(http, each, security, deadline_s) for each in (local, *members))
        )
    for member, answer in zip(members, answers, strict=True):
        if member in configured or not _is_same(own.hello, answer.hello):  # it finds itself, too
            checks.append(_judge(member.name, answer, own.hello, config.agent.lookup_ms))
    return checks


def _is_same(own: wire.PeerHello | None, other: wire.PeerHello | None) -> bool:
    return own is not None and other is not None and own.agent_id == other.agent_id


async def _discover(config: Config, deadline_s: float) -> tuple[list[Check], list[Member]]:
    """A check for each source of peers, and the peers that they know."""
    discovery, checks, members = config.discovery, list[Check](), list[Member]()
    for text in discovery.dns:
        title = f"discovery.dns {text}"
        try:
            async with asyncio.timeout(deadline_s):
                found = await Resolver(Address.parse(text)).members()
        except (OSError, TimeoutError) as error:
            fault = str(error) or f"no answer within {deadline_s:g} s"
            checks.append(fail(title, fault, "mend the name, or the resolver of this host"))
            continue
        members += found
        checks.append(ok(title, f"{len(found)} addresses"))
    if discovery.registry is not None:
        try:
            registry = Registry(discovery, "doctor", "")
            async with asyncio.timeout(deadline_s), contextlib.aclosing(registry):
                found = await registry.others()
        except RedisSetupError as error:
            checks.append(fail("discovery.registry", str(error), "mend that"))
        except redis_faults() as error:
            fault = str(error) or f"no answer within {deadline_s:g} s"
            checks.append(fail("discovery.registry", fault, "start the server, or mend the URL"))
        else:
            members += found
            checks.append(ok("discovery.registry", f"{len(found)} agents are listed"))
    return checks, members


async def _ask(
    http: aiohttp.ClientSession, member: Member, security: AgentSecurity, deadline_s: float
) -> Answer:
    try:
        async with asyncio.timeout(deadline_s):
            await _hello(http, member, security)
            started_s = time.monotonic()
            hello = await _hello(http, member, security)
            return Answer(hello, 1000 * (time.monotonic() - started_s))
    except TimeoutError:
        return Answer(fault=f"no answer within {deadline_s:g} s")
    except (aiohttp.ClientError, OSError, wire.WireError) as error:
        return Answer(fault=str(error) or type(error).__name__)


async def _hello(
    http: aiohttp.ClientSession, member: Member, security: AgentSecurity
) -> wire.PeerHello:
    url = f"{security.scheme}://{member.name}/v1/hello"
    options: dict[str, Any] = {**security.request_options()}
    if security.tls is not None and member.tls_name is not None:
        options["server_hostname"] = member.tls_name
    async with http.get(url, **options) as response:
        if response.status in (401, 403):
            raise wire.WireError("http", "it refuses our certificate or token: ask its log")
        if response.status != 200:
            raise wire.WireError("http", f"it answers {response.status}: no agent of ours")
        body = bytearray()
        async for part in response.content.iter_any():
            body += part
            if len(body) > wire.MAX_REQUEST_BYTES:
                raise wire.WireError("oversized", "its hello is larger than any may be")
    return wire.decode(wire.PeerHello, bytes(body))


def _judge(name: str, answer: Answer, own: wire.PeerHello | None, lookup_ms: int) -> Check:
    title, theirs = f"peer {name}", answer.hello
    if theirs is None:
        return fail(title, answer.fault, "start its agent, or mend the address or the firewall")
    if theirs.version != wire.WIRE_VERSION:
        return fail(
            title,
            f"it speaks version {theirs.version}, we speak {wire.WIRE_VERSION}",
            "install the same mcp-vllm on both",
        )
    if own is not None and own.agent_id == theirs.agent_id:
        return fail(title, "that is this host's own agent", "remove it from peers")
    if own is None or not own.fingerprints or not theirs.fingerprints:
        missing = "here" if own is None or not own.fingerprints else "there"
        return warn(
            title,
            f"reachable in {answer.round_trip_ms:.0f} ms; no engine has connected {missing} yet",
            "ask again when engines run on both hosts: only then can they be compared",
        )
    return _compare(title, answer.round_trip_ms, own, theirs, lookup_ms)


def _compare(
    title: str, round_trip_ms: float, own: wire.PeerHello, theirs: wire.PeerHello, lookup_ms: int
) -> Check:
    ours = [Fingerprint(fields) for fields in own.fingerprints]
    others = [Fingerprint(fields) for fields in theirs.fingerprints]
    known = {other.digest for other in others}
    num_shared = sum(each.digest in known for each in ours)
    if not num_shared:
        closest = ours[-1].closest(others)
        assert closest is not None
        return fail(
            title,
            f"its engines differ from ours in {ours[-1].first_difference(closest)}",
            "run the same model, vLLM and options on both; until then nothing is exchanged",
        )
    found = (
        f"compatible, {num_shared} of {len(ours)} engine kinds in common; {round_trip_ms:.0f} ms"
    )
    if round_trip_ms > LOOKUP_SHARE * lookup_ms:
        return warn(
            title,
            found,
            f"a lookup there has {LOOKUP_SHARE * lookup_ms:.0f} ms: raise agent.lookup_ms above "
            f"{round_trip_ms / LOOKUP_SHARE:.0f}",
        )
    return ok(title, found)
