"""Connections to a Redis or Valkey server, for whatever needs one. Does not connect yet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mcp_vllm.errors import McpError

if TYPE_CHECKING:
    from redis.asyncio import Redis


class RedisSetupError(McpError):
    """A server cannot be used as configured."""


def redis_faults() -> tuple[type[Exception], ...]:
    """What a command raises when the server is away, slow, or says no."""
    from redis.exceptions import RedisError

    return (RedisError, OSError, TimeoutError)


def open_redis(
    url: str, password_file: Path | None, answer_s: float, *, key: str, password_key: str
) -> Redis:
    """A client whose commands are tried once on a connection that works, each within `answer_s`.

    Args:
        key: the configuration's key for `url`, and `password_key` that for the file: for errors.

    Raises:
        RedisSetupError: no client is installed, or the file cannot be read.
    """
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import ConnectionError as RedisConnectionError
    except ImportError as error:
        raise RedisSetupError(
            f'{key} needs a client that is not installed: pip install "mcp-vllm[redis]"'
        ) from error
    password = None
    if password_file is not None:
        try:
            password = password_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RedisSetupError(
                f"{password_key}: cannot read {password_file}: {error}"
            ) from error
    # Once more at once: a pooled connection may have been closed by a restart of the server.
    again = Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
    return Redis.from_url(
        url,
        password=password,
        socket_timeout=answer_s,
        socket_connect_timeout=answer_s,
        retry=again,
    )
