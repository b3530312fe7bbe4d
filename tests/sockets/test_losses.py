"""What went through a lossy tier is marked, and given only to those who allow that tier."""

from pathlib import Path

import numpy as np
import pytest
from simulated import (
    CHUNK_BYTES,
    SimulatedEngine,
    address,
    get_json,
    key,
    keys,
    running_agent,
    settings,
    until,
)

from mcp_vllm.link import protocol
from mcp_vllm.link.events import JobDone
from mcp_vllm.link.protocol import GroupLayout, PageLayout
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


PAGES = PageLayout("channel-major-keys", (0, 1), 1, 64, 1, 48)
TWO_LAYERS = (GroupLayout(((0, CHUNK_BYTES),), "bf16", 48, PAGES),)


async def moved(tmp_path: Path, codecs: dict, position: int):
    """(Bytes at the source, bytes after the move, what the load said)."""
    async with running_agent(settings(codec="raw", codecs=codecs), tmp_path / "a.sock") as there:
        with SimulatedEngine(tmp_path / "a.sock", groups=TWO_LAYERS) as source:
            await source.connected()
            source.fill(0, 0)
            job_id = source.new_id()
            source.link.send(protocol.Store(job_id, keys(0), [0], "", [position]))
            await source.event(JobDone, job_id)
            (namespace,) = there._context.fingerprints
            await until(lambda: len(there._context.store) == 1, "the commit")
            loaded = set(codecs.get("lossy", ())) | {"raw"}
            await until(
                lambda: loaded <= set(there._context.codecs.speeds(namespace)), "the codecs there"
            )
            ours = settings(address(there), codec="raw", codecs=codecs)
            async with running_agent(ours, tmp_path / "b.sock") as here:
                with SimulatedEngine(tmp_path / "b.sock", groups=TWO_LAYERS) as engine:
                    await engine.connected()
                    await until(
                        lambda: loaded <= set(here._context.codecs.speeds(namespace)),
                        "the codecs here",
                    )
                    engine.prepare("r")
                    await engine.lookup("r", keys(0))
                    done = await engine.load("r", keys(0), [3])
                    assert not done.failed
                    return source.payload(0), engine.payload(3), done


def floats(raw: bytes) -> np.ndarray:
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)


async def test_a_lossy_tier_is_used_where_it_is_allowed_and_marked(tmp_path):
    codecs = {"lossy": ["near-lossless"], "wire": "near-lossless"}
    before, after, done = await moved(tmp_path, codecs, position=1)
    assert done.losses == ((0, "near-lossless"),)
    assert done.wire_bytes < 0.7 * done.raw_bytes
    assert before != after
    assert np.abs(floats(before) - floats(after)).max() < 0.02 * np.abs(floats(before)).max()


async def test_without_allowance_nothing_is_lost(tmp_path):
    before, after, done = await moved(tmp_path, {}, position=1)
    assert before == after
    assert not done.losses


async def test_a_calibrated_tier_without_calibration_is_not_used(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MCP_VLLM_CACHE", str(tmp_path / "cache"))
    async with running_agent(settings(codecs={"lossy": ["small"]}), tmp_path / "a.sock") as agent:
        with SimulatedEngine(tmp_path / "a.sock", groups=TWO_LAYERS) as engine:
            await engine.connected()
            await until(lambda: "mcp-vllm codec calibrate" in caplog.text, "the warning")
            (namespace,) = agent._context.fingerprints
            assert agent._context.codecs.get("small", namespace, b"") is None
