"""What the machine itself adds to an answer: round trips to a process that does nothing else.

Beside figures of a busy machine: a question cannot be answered sooner than an empty one. The echo
is this file, run as a process; it uses asyncio over a Unix socket, as an agent does.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

EVERY_S = 0.01
MESSAGE = b"x" * 64


@contextlib.asynccontextmanager
async def measured(folder: Path, note: Callable[[float], None]) -> AsyncIterator[None]:
    """Hand the seconds of one round trip after the other to `note`, until the end."""
    path = folder / "echo.sock"
    command = [sys.executable, __file__, str(path)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    reader, writer = await asyncio.open_unix_connection(path)

    async def ask() -> None:
        while True:
            begun_s = time.perf_counter()
            writer.write(MESSAGE)
            await reader.readexactly(len(MESSAGE))
            note(time.perf_counter() - begun_s)
            await asyncio.sleep(EVERY_S)

    asking = asyncio.create_task(ask())
    try:
        yield
    finally:
        asking.cancel()
        writer.close()
        process.kill()
        await process.wait()


async def _echo(path: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(1024):
            writer.write(part)

    server = await asyncio.start_unix_server(answer, path)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_echo(sys.argv[1]))
