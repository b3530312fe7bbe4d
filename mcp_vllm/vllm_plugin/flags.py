"""Our command-line flags, added to vLLM's shared engine arguments.

vLLM offers no hook for that, so `EngineArgs.add_cli_args` and `from_cli_args` are wrapped, once per
process. The flags only translate into a `KVTransferConfig`; without any of them the wrapped
functions do what they did.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from vllm.config.kv_transfer import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from mcp_vllm.config import Address, Config, ConfigError
from mcp_vllm.config.split import SplitConfig
from mcp_vllm.errors import McpError
from mcp_vllm.vllm_plugin import CONNECTOR, settings, split_settings
from mcp_vllm.vllm_plugin.settings import RESOLVED_KEY, SETTINGS_KEY

logger = logging.getLogger(__name__)

SESSION_MIDDLEWARE = "mcp_vllm.vllm_plugin.session_header.SessionHeaderMiddleware"
_INSTALLED = "_mcp_vllm_flags"


class FlagError(McpError):
    """Flags that contradict each other; the message names both."""


def install() -> None:
    """Wrap vLLM's engine arguments. Idempotent."""
    if hasattr(EngineArgs, _INSTALLED):
        return
    setattr(EngineArgs, _INSTALLED, True)
    _wrap_add_cli_args()
    _wrap_from_cli_args()
    for args_class in (EngineArgs, AsyncEngineArgs):
        _wrap_init(args_class)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add our group to `parser`."""
    group = parser.add_argument_group(
        title="MCPConfig",
        description="Sessions that follow the user between engines (mcp_vllm).",
    )
    group.add_argument(
        "--kv-connector",
        metavar="NAME",
        default=None,
        help="KV connector by name; `mcp` stores this engine's context blocks in a context agent "
        "and imports those of its peers. Short for --kv-transfer-config "
        '\'{"kv_connector": NAME, "kv_role": "kv_both"}\'.',
    )
    group.add_argument(
        "--mcp-config",
        metavar="FILE|JSON",
        type=_valid_config,
        default=None,
        help="Settings of connector `mcp`: a YAML or JSON file, or JSON text. All keys: "
        "docs/configuration.md.",
    )
    group.add_argument(
        "--mcp-peer",
        metavar="HOST:PORT",
        type=_valid_peer,
        action="append",
        default=None,
        help="Another host's context agent to import blocks from; may be given several times. "
        "Replaces `peers` of --mcp-config.",
    )
    group.add_argument(
        "--mcp-split",
        metavar="FILE|JSON",
        type=_valid_split,
        default=None,
        help="Run the model's middle layers at a stage (`mcp-vllm stage`): a YAML or JSON file, or "
        "JSON text. All keys: docs/split.md.",
    )


def resolve(
    kv_connector: str | None,
    mcp_config: str | None,
    mcp_peer: Sequence[str] | None,
    transfer_config: KVTransferConfig | None,
) -> KVTransferConfig | None:
    """What the four settings together mean.

    Raises:
        FlagError: two of them contradict each other.
        ConfigError: `mcp_config` is not valid.
    """
    named = transfer_config.kv_connector if transfer_config is not None else None
    if kv_connector and named and kv_connector != named:
        raise FlagError(
            f"--kv-connector {kv_connector} contradicts --kv-transfer-config, which names "
            f"kv_connector {named!r}: give one of them"
        )
    connector = kv_connector or named
    for flag, value in (("--mcp-config", mcp_config), ("--mcp-peer", mcp_peer)):
        if value and connector != CONNECTOR:
            raise FlagError(f"{flag} needs --kv-connector mcp, not {connector!r}")
    if connector is None:
        return transfer_config
    if transfer_config is None or named is None:
        transfer_config = KVTransferConfig(kv_connector=connector, kv_role="kv_both")
    if connector == CONNECTOR:
        _add_settings(transfer_config, mcp_config, mcp_peer)
    return transfer_config


def _add_settings(
    transfer_config: KVTransferConfig, mcp_config: str | None, mcp_peer: Sequence[str] | None
) -> None:
    extra = transfer_config.kv_connector_extra_config
    if mcp_config and SETTINGS_KEY in extra:
        raise FlagError(
            "--mcp-config contradicts --kv-transfer-config, which has settings under "
            f"kv_connector_extra_config.{SETTINGS_KEY}: give one of them"
        )
    if RESOLVED_KEY not in extra:
        source = mcp_config or extra.get(SETTINGS_KEY)
        config = settings.resolve(extra, Config.load(source, peers=tuple(mcp_peer or ())))
        if mcp_peer and config.agent.socket is not None:
            logger.warning(
                "--mcp-peer has no effect: the agent at %s runs on its own and asks its own peers",
                config.agent.socket,
            )


def _valid_config(text: str) -> str:
    try:
        Config.load(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _valid_split(text: str) -> str:
    try:
        SplitConfig.load(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _valid_peer(text: str) -> str:
    try:
        return str(Address.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _wrap_add_cli_args() -> None:
    original = EngineArgs.add_cli_args

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        add_flags(parser)
        return parser

    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def _wrap_from_cli_args() -> None:
    original = EngineArgs.from_cli_args.__func__

    @functools.wraps(original)
    def from_cli_args(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        try:
            args.kv_transfer_config = resolve(
                getattr(args, "kv_connector", None),
                getattr(args, "mcp_config", None),
                getattr(args, "mcp_peer", None),
                getattr(args, "kv_transfer_config", None),
            )
            if getattr(args, "mcp_split", None):
                split_settings.apply(args, args.mcp_split)
        except McpError as error:
            sys.exit(f"vllm: error: {error}")
        _add_session_header(args)
        return original(cls, args)

    EngineArgs.from_cli_args = classmethod(from_cli_args)


def _add_session_header(args: argparse.Namespace) -> None:
    """Let the API server read `X-Session-Id`, where there is an API server and connector `mcp`."""
    config = args.kv_transfer_config
    middleware = getattr(args, "middleware", None)
    is_ours = config is not None and config.kv_connector == CONNECTOR
    if is_ours and middleware is not None and SESSION_MIDDLEWARE not in middleware:
        args.middleware = [*middleware, SESSION_MIDDLEWARE]


def _wrap_init(args_class: type[EngineArgs]) -> None:
    """`LLM(..., kv_connector="mcp", mcp_config=..., mcp_peer=[...])` after `register()`, and
    `LLM(..., mcp_split=...)`."""
    original = args_class.__init__

    @functools.wraps(original)
    def __init__(self: EngineArgs, *args: Any, **kwargs: Any) -> None:
        ours = {name: kwargs.pop(name, None) for name in ("kv_connector", "mcp_config", "mcp_peer")}
        if any(ours.values()):
            transfer_config = kwargs.get("kv_transfer_config")
            kwargs["kv_transfer_config"] = resolve(**ours, transfer_config=transfer_config)
        if (split := kwargs.pop("mcp_split", None)) is not None:
            wanted = SimpleNamespace(**kwargs)
            split_settings.apply(wanted, split)
            kwargs = vars(wanted)
        original(self, *args, **kwargs)

    args_class.__init__ = __init__  # type: ignore[method-assign]
