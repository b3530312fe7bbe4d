"""Writing a long answer to a peer that may have stopped reading."""

from __future__ import annotations

import asyncio

from aiohttp import web

# A peer that does not take what is sent for this long is not reading any more.
SEND_STALL_S = 30.0


async def write(response: web.StreamResponse, part: bytes | memoryview) -> None:
    """Send it. Raises ConnectionError when the peer does not read."""
    try:
        async with asyncio.timeout(SEND_STALL_S):
            await response.write(part)
    except TimeoutError as error:
        raise ConnectionResetError("the peer does not read what it asked for") from error
