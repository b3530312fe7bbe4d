"""Whether an agent can start: `agent.listen` (peers), `agent.socket` (engines) and its codec.

Nothing is left behind: what is bound here is released at once.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path

from mcp_vllm.codec import CodecError, get_codec
from mcp_vllm.config import Address, AgentConfig, Config
from mcp_vllm.doctor.check import Check, fail, ok, warn
from mcp_vllm.link.supervisor import own_socket_path
from mcp_vllm.security.errors import SecurityError
from mcp_vllm.security.tls import client_context

DEADLINE_S = 2.0
# sockaddr_un has 108 bytes, the last of which is zero.
MAX_SOCKET_PATH_BYTES = 107
MAX_HEALTH_BYTES = 64 << 10
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def reachable_listen(config: Config) -> Address:
    """Where this host's own agent can be asked: its address, loopback for a wildcard."""
    listen = Address.parse(config.agent.listen)
    return Address(WILDCARDS.get(listen.host, listen.host), listen.port)


def check_listen(config: Config) -> Check:
    """Can an agent listen there, or does one of ours already?"""
    name, listen = "agent.listen", Address.parse(config.agent.listen)
    try:
        _bind_once(listen)
    except socket.gaierror as error:
        return fail(name, f"{listen}: {error.strerror}", "use an address of this host")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return _check_taken(config, listen)
        return fail(
            name, f"cannot listen at {listen}: {error.strerror}", "use another address or port"
        )
    if not listen.is_loopback and not config.security.tls.is_set:
        return warn(
            name,
            f"{listen} is free; whoever reaches it can read this host's chunks",
            "set security.tls (docs/security.md), or keep it in a private network or VPN",
        )
    return ok(name, f"{listen} is free" if listen.port else "any free port")


def _bind_once(listen: Address) -> None:
    family, kind, protocol, _, where = socket.getaddrinfo(
        listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(where)
        probe.listen(1)


def _check_taken(config: Config, listen: Address) -> Check:
    name = "agent.listen"
    health = ask_health(config)
    if health is not None:
        return ok(
            name,
            f"{listen} is served by agent {health.get('agent_id')} "
            f"(mcp-vllm {health.get('version')})",
        )
    if config.agent.socket is None and config.agent.listen == AgentConfig().listen:
        return warn(
            name,
            f"{listen} is taken by another program; the engine's agent will move to a free port",
            "set agent.listen to a free port if peers shall find it",
        )
    return fail(name, f"{listen} is taken by another program", "set agent.listen to a free port")


def ask_health(config: Config) -> dict[str, object] | None:
    """What `/healthz` of this host's agent says; None when nobody or somebody else answers."""
    address, ca = reachable_listen(config), config.security.tls.ca
    url = f"{'https' if ca else 'http'}://{address}/healthz"
    try:
        context = client_context(ca) if ca else None
        if context is not None:
            context.check_hostname = False  # a wildcard is asked at a loopback address
        with urllib.request.urlopen(url, timeout=DEADLINE_S, context=context) as response:
            health = json.loads(response.read(MAX_HEALTH_BYTES))
    except (OSError, ValueError, urllib.error.URLError, SecurityError):
        return None
    return health if isinstance(health, dict) and "agent_id" in health else None


def check_socket(config: Config) -> Check:
    """Can an agent listen at its Unix socket, and does one?"""
    name, standalone = "agent.socket", config.agent.socket is not None
    # Without a path of its own, an engine's agent listens at one named after the engine.
    path = config.agent.socket or own_socket_path("0" * 36)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        return fail(
            name,
            f"{path} has {len(os.fsencode(path))} bytes; {MAX_SOCKET_PATH_BYTES} are allowed",
            "use a shorter agent.socket" if standalone else "set XDG_RUNTIME_DIR to a shorter path",
        )
    folder = _existing(path.parent)
    if not os.access(folder, os.W_OK | os.X_OK):
        return fail(
            name,
            f"{path}: user {os.getuid()} cannot write to {folder}",
            f"create {path.parent} for this user, or set agent.socket elsewhere",
        )
    if not standalone:
        return ok(name, f"not set: the engine starts its own agent, socket in {path.parent}")
    return _check_served(path)


def _existing(folder: Path) -> Path:
    """`folder`, or its nearest parent that is there."""
    return next(each for each in (folder, *folder.parents) if each.exists())


def _check_served(path: Path) -> Check:
    name = "agent.socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(DEADLINE_S)
        try:
            probe.connect(str(path))
        except PermissionError:
            return fail(
                name,
                f"{path} belongs to another user's agent",
                "run the agent and the engines as the same user",
            )
        except OSError:
            return warn(
                name,
                f"no agent serves {path}",
                "start one: mcp-vllm agent --config FILE; engines serve without it until then",
            )
    return ok(name, f"an agent serves {path}")


def check_codec(config: Config) -> Check:
    """Does this version have the configured codec?"""
    try:
        get_codec(config.codec.name, config.codec.level)
    except (CodecError, ValueError) as error:
        return fail("codec", str(error), "set codec.name to one that this version has")
    return ok("codec", f"{config.codec.name}, level {config.codec.level}")
