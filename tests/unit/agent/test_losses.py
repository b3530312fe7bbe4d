"""What went through a lossy tier is marked, and given only to those who allow that tier."""

from pathlib import Path

import pytest
from simulated import SimulatedEngine, address, get_json, key, keys, running_agent, settings, until

from mcp_vllm.link import protocol
from mcp_vllm.store.ram import ChunkKey

ALLOWED = {"lossy": ["balanced"]}


async def stored(agent, engine, loss: str) -> None:
    engine.fill(0, 0)
    assert not (await engine.store(keys(0), [0], loss)).failed
    await until(lambda: len(agent._context.store) == 1, "the commit")


@pytest.mark.parametrize(
    ("codecs", "loss", "found"),
    [
        ({}, "", 1),
        ({}, "balanced", 0),
        (ALLOWED, "balanced", 1),
        (ALLOWED, "small", 0),
        (ALLOWED, "near-lossless", 0),
    ],
)
async def test_a_peer_gets_what_it_accepts(tmp_path: Path, codecs, loss, found):
    async with running_agent(settings(), tmp_path / "a.sock") as there:
        with SimulatedEngine(tmp_path / "a.sock") as source:
            await source.connected()
            await stored(there, source, loss)
            config = settings(address(there), codecs=codecs)
            async with running_agent(config, tmp_path / "b.sock") as here:
                with SimulatedEngine(tmp_path / "b.sock") as engine:
                    await engine.connected()
                    engine.prepare("r", "alice")
                    assert await engine.lookup("r", keys(0)) == [found]
                    if not found:
                        return
                    done = await engine.load("r", keys(0), [3])
                    assert not done.failed
                    assert done.losses == (((0, loss),) if loss else ())
                    assert engine.payload(3) == source.payload(0)
                    engine.link.send(protocol.Finish("r", [keys(0)], 16))
                    await engine.lookup("x", keys(0))
                    (session,) = (await get_json(here, "/v1/sessions"))["sessions"]
                    assert session["loss"] == (loss or "none")


@pytest.mark.parametrize(
    ("tenant", "salted", "found"),
    [("lab", True, 1), ("lab", False, 0), ("clinic", True, 0)],
)
async def test_a_tenants_own_allowance_needs_keys_of_its_own(tmp_path, tenant, salted, found):
    codecs = {**ALLOWED, "lossy_tenants": ["lab"]}
    async with running_agent(settings(), tmp_path / "a.sock") as there:
        with SimulatedEngine(tmp_path / "a.sock") as source:
            await source.connected()
            await stored(there, source, "balanced")
            config = settings(address(there), codecs=codecs)
            async with running_agent(config, tmp_path / "b.sock"):
                with SimulatedEngine(tmp_path / "b.sock") as engine:
                    await engine.connected()
                    engine.prepare("r", None, tenant, salted)
                    assert await engine.lookup("r", keys(0)) == [found]


async def test_what_was_computed_without_loss_replaces_what_was_not(tmp_path):
    async with running_agent(settings(), tmp_path / "a.sock") as agent:
        with SimulatedEngine(tmp_path / "a.sock") as engine:
            await engine.connected()
            (namespace,) = agent._context.fingerprints
            name = ChunkKey(namespace, key(0))
            for loss, expected in (("small", "small"), ("balanced", "balanced"), ("", ""),
                                   ("balanced", "")):  # fmt: skip
                await stored(agent, engine, loss)
                await engine.lookup("x", keys(0))
                assert agent._context.store.get(name).loss == expected
            agent._context.store.check_integrity()
