"""The configured peers: reachable, of our version, quick enough, and compatible with our engines.

Compatibility can be told only when the local agent runs and an engine has connected to it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from mcp_vllm.agent import wire
from mcp_vllm.agent.lookups import LOOKUP_SHARE
from mcp_vllm.agent.security import AgentSecurity
from mcp_vllm.config import Config
from mcp_vllm.doctor.agent_start import reachable_listen
from mcp_vllm.doctor.check import Check, fail, ok, warn
from mcp_vllm.security.errors import SecurityError
from mcp_vllm.session.fingerprint import Fingerprint

DEADLINE_S = 2.0


@dataclass(frozen=True)
class Answer:
    """A peer's hello and how long a second one took on the warm connection; or the fault."""

    hello: wire.PeerHello | None = None
    round_trip_ms: float = 0.0
    fault: str = ""


def check_peers(config: Config, deadline_s: float = DEADLINE_S) -> list[Check]:
    """One check a peer; all are asked at once."""
    if not config.peers and config.discovery.is_set:
        return [ok("peers", "found while serving: `mcp-vllm peers` asks the agent for them")]
    if not config.peers:
        return [ok("peers", "none configured: contexts stay on this host")]
    local = str(reachable_listen(config))
    try:
        # The audit is the agent's to write.
        security = AgentSecurity(config.security.model_copy(update={"audit_file": None}))
    except SecurityError as error:
        return [
            fail("security", str(error), "mend the file, or name another one: docs/security.md")
        ]
    own, *answers = asyncio.run(_ask_all([local, *config.peers], security, deadline_s))
    return [
        _judge(name, answer, own.hello, config.agent.lookup_ms)
        for name, answer in zip(config.peers, answers, strict=True)
    ]


async def _ask_all(
    names: Sequence[str], security: AgentSecurity, deadline_s: float
) -> list[Answer]:
    async with aiohttp.ClientSession() as http:
        return await asyncio.gather(*(_ask(http, name, security, deadline_s) for name in names))


async def _ask(
    http: aiohttp.ClientSession, name: str, security: AgentSecurity, deadline_s: float
) -> Answer:
    try:
        async with asyncio.timeout(deadline_s):
            await _hello(http, name, security)
            started_s = time.monotonic()
            hello = await _hello(http, name, security)
            return Answer(hello, 1000 * (time.monotonic() - started_s))
    except TimeoutError:
        return Answer(fault=f"no answer within {deadline_s:g} s")
    except (aiohttp.ClientError, OSError, wire.WireError) as error:
        return Answer(fault=str(error) or type(error).__name__)


async def _hello(http: aiohttp.ClientSession, name: str, security: AgentSecurity) -> wire.PeerHello:
    url = f"{security.scheme}://{name}/v1/hello"
    async with http.get(url, **security.request_options()) as response:
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
