"""Imports that break off go on where they stopped."""

import asyncio
import contextlib

import numpy as np
from restartable_agent import contents, until_awaited
from simulated import CHUNK_BYTES, SimulatedEngine, address, keys, running_agent, settings, until
from simulated_sessions import ALICE, call, turn
from throttle import Throttle

from mcp_vllm.client import AsyncMCPClient

IMPORT = "/v1/sessions/import"
NUM_CHUNKS, GROUP_BYTES = 30, 16 << 10


async def archive_of_session(folder) -> bytes:
    async with running_agent(settings(codec="raw"), folder / "from.sock") as agent:
        with SimulatedEngine(folder / "from.sock") as engine:
            await engine.connected()
            for number in range(NUM_CHUNKS):
                engine.rows[number] = np.random.default_rng(number).integers(0, 256, CHUNK_BYTES)
            names = keys(*range(NUM_CHUNKS))
            await engine.store(names, range(NUM_CHUNKS))
            await turn(agent, engine, chains=[names, []])
            return (await call(agent, "GET", f"{ALICE}/export"))[1]


async def send_part(agent, archive: bytes, num_bytes: int, query: str) -> None:
    """Send the beginning of the body, and break off."""
    _, writer = await asyncio.open_connection("127.0.0.1", agent.port)
    head = f"POST {IMPORT}?{query} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(archive)}\r\n\r\n"
    writer.write(head.encode() + archive[:num_bytes])
    await writer.drain()
    await until(lambda: len(agent._context.store) >= num_bytes // GROUP_BYTES - 2, "the chunks")
    writer.transport.abort()


async def received(agent, upload: str) -> int:
    return (await call(agent, "GET", f"{IMPORT}?upload={upload}"))[1]["received"]


async def test_an_import_goes_on_after_the_last_whole_frame(tmp_path):
    archive = await archive_of_session(tmp_path)
    async with running_agent(settings(codec="raw"), tmp_path / "to.sock") as agent:
        half = len(archive) // 2
        assert await received(agent, "one") == 0
        await send_part(agent, archive, half, "upload=one")
        await until_awaited(lambda: received(agent, "one"), "the end of the connection")
        at = await received(agent, "one")
        assert half - 2 * GROUP_BYTES < at <= half
        assert (await call(agent, "GET", ALICE))[0] == 404, "half a session is none"
        assert await received(agent, "another") == 0
        wrong = f"{IMPORT}?upload=one&offset={at + 1}"
        assert (await call(agent, "POST", wrong, data=archive[at + 1 :]))[0] == 409
        rest = f"{IMPORT}?upload=one&offset={at}"
        status, shown = await call(agent, "POST", rest, data=archive[at:])
        assert (status, shown["held_chunks"]) == (200, NUM_CHUNKS)
        assert len(await contents(agent, ALICE)) == NUM_CHUNKS
        assert await received(agent, "one") == 0


async def test_what_was_changed_meanwhile_is_not_imported(tmp_path):
    archive = await archive_of_session(tmp_path)
    async with running_agent(settings(codec="raw"), tmp_path / "to.sock") as agent:
        await send_part(agent, archive, len(archive) // 2, "upload=one")
        await until_awaited(lambda: received(agent, "one"), "the end of the connection")
        at = await received(agent, "one")
        rest = bytearray(archive[at:])
        rest[-1] ^= 1
        status, _ = await call(agent, "POST", f"{IMPORT}?upload=one&offset={at}", data=bytes(rest))
        assert status == 400
        assert (await call(agent, "GET", ALICE))[0] == 404


async def test_the_client_goes_on_by_itself_when_the_connection_breaks(tmp_path):
    archive = await archive_of_session(tmp_path)
    path = tmp_path / "session.mcps"
    path.write_bytes(archive)
    async with (
        running_agent(settings(codec="raw"), tmp_path / "to.sock") as agent,
        contextlib.AsyncExitStack() as stack,
    ):
        link = Throttle(address(agent), 200e3)
        await stack.enter_async_context(link.running())
        client = await stack.enter_async_context(AsyncMCPClient(f"http://{link.address}"))
        importing = asyncio.create_task(client.import_file(path))
        await until(lambda: len(agent._context.store) >= NUM_CHUNKS // 3, "a part of it")
        link.cut()
        link.bytes_s = 1e9
        assert (await importing).held_chunks == NUM_CHUNKS


async def test_names_and_places_that_make_no_sense_are_refused(tmp_path):
    async with running_agent(settings(), tmp_path / "a.sock") as agent:
        for query in ("upload=", "upload=a/b", "upload=one&offset=-1", "upload=one&offset=x"):
            assert (await call(agent, "POST", f"{IMPORT}?{query}", data=b"x"))[0] == 400
        assert (await call(agent, "POST", f"{IMPORT}?upload=one&offset=5", data=b"x"))[0] == 409
        assert (await call(agent, "GET", IMPORT))[0] == 400
