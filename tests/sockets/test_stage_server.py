"""Engine and stage over real sockets; the layers are simulated."""

import dataclasses
import socket
import threading
import time

import msgspec
import numpy as np
import pytest
import torch
from simulated_security import Issuer, tls_files
from stages_for_tests import (
    FACTS,
    HELLO,
    KV_INIT,
    PAGE_BYTES,
    AddingLayers,
    AddingLease,
    dialled,
    leased,
    raw_connection,
    rows_of,
    running_stage,
    stages,
    step_of,
)

from mcp_vllm.config.split import StageSecurity
from mcp_vllm.split import wire
from mcp_vllm.split.channel import Channel, Patience
from mcp_vllm.split.errors import SplitError, StageLost, StageRefused
from mcp_vllm.split.watch import Watch
from mcp_vllm.split.wire import Acts, Kind, KvBlocks, Step
from tests.waiting import wait_for


@pytest.mark.parametrize("form", ["raw", "packed", "fold", "fp8"])
def test_a_step_runs_at_the_stage_and_its_rows_come_back(form):
    with running_stage() as stage:
        hello = msgspec.structs.replace(HELLO, form=form)
        link = dialled(stages(stage.address, hello=hello))
        link.init_kv(KV_INIT, 5.0)
        for number in (1, 2, 3):
            link.begin(number, step_of(5))
            result = link.run(number, [1], rows_of(5)).activations
            if form in ("raw", "packed"):
                assert torch.equal(result.hidden, rows_of(5).hidden + 1)
                assert torch.equal(result.residual, rows_of(5).residual + 2)
            else:
                assert torch.equal(result.hidden + result.residual, torch.full((5, 8), 3.0))
        wait_for("the last step's count", lambda: stage.count("steps_total") == 3)
        assert stage.count("tokens_total") == 15
        link.close()
        wait_for("the lease to end", lambda: not stage.backend.leases)


@pytest.mark.parametrize("shares_cores", [True, False])
def test_where_cores_are_shared_both_sides_say_what_comes_soon(monkeypatch, shares_cores):
    welcome = msgspec.structs.replace(AddingLease.welcome, shares_cores=shares_cores)
    monkeypatch.setattr(AddingLease, "welcome", welcome)
    expected = [Kind.SOON] if shares_cores else []
    with running_stage() as stage:
        link = leased(stage.address)
        link.begin(1, step_of(2))
        link.announce()
        assert torch.equal(link.run(1, [1], rows_of(2)).activations.hidden, rows_of(2).hidden + 1)
        link.begin(2, step_of(2))
        link.channel.send(Kind.ACTS, Acts([1]), link.form.encode(rows_of(2)), 2)
        assert kinds_until(Kind.REPLY, link.channel) == expected
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours)
        channel.shares_cores = link.channel.shares_cores
        dataclasses.replace(link, channel=channel).announce()
        channel.send(Kind.BYE)
        assert kinds_until(Kind.BYE, Channel(theirs)) == expected


def kinds_until(last: Kind, channel: Channel) -> list[Kind]:
    """The kinds of messages before one, as they are on the wire."""
    kinds = []
    while True:
        header = channel._read(wire.HEADER.size, Patience(silence_s=5.0), None)
        kind = wire.unpack_header(header, 1 << 10, 1 << 10).kind
        if kind == last:
            return kinds
        kinds.append(kind)


def test_a_step_without_tokens_is_settled_and_not_answered():
    with running_stage() as stage:
        link = leased(stage.address)
        idle = Step([7], [], [], [], [], [])
        link.begin(1, idle)
        link.begin(2, step_of(2))
        link.run(2, [1], rows_of(2))
        assert stage.backend.leases[0].settled == [idle]


def test_kv_pages_are_read_and_written_between_steps_and_before_activations():
    pages = np.arange(3 * PAGE_BYTES, dtype=np.uint8).reshape(3, PAGE_BYTES)
    with running_stage() as stage:
        link = leased(stage.address)
        blocks = KvBlocks(["layers.1"], [5, 0, 2])
        link.write_kv(blocks, memoryview(pages).cast("B"))
        link.begin(1, step_of(2))
        assert link.read_kv(blocks, pages.nbytes) == pages.tobytes()
        link.write_kv(KvBlocks(["layers.1"], [1]), memoryview(pages[0]).cast("B"))
        assert torch.equal(link.run(1, [1], rows_of(2)).activations.hidden, rows_of(2).hidden + 1)
        held = stage.backend.leases[0].pages
        np.testing.assert_array_equal(held[[5, 0, 2, 1, 3]], [*pages, pages[0], 0 * pages[0]])


def test_an_engine_that_stores_kv_refuses_a_stage_that_packs_it_otherwise():
    with running_stage() as stage:
        with pytest.raises(StageRefused, match="KV pages are for it does not say what, ours for x"):
            dialled(stages(stage.address, packing="x86_64 amx"))
        wait_for("the lease to end", lambda: not stage.backend.leases)
        dialled(stages(stage.address)).close()


@pytest.mark.parametrize(
    ("layers", "size", "message"),
    [(["layers.9"], 64, "no such layer"), (["layers.1"], 65, "64 bytes of KV pages, not 65")],
)
def test_kv_pages_that_are_not_there_end_the_lease(layers, size, message):
    with running_stage() as stage:
        link = leased(stage.address)
        with pytest.raises(StageLost, match=message):
            link.read_kv(KvBlocks(layers, [0]), size)


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "tls"])
def test_a_stage_that_computes_for_long_is_alive(tmp_path, secured):
    """Its answer takes longer than silence may last: pings are answered meanwhile."""
    tls = {name: str(path) for name, path in vars(tls_files(tmp_path)).items()} if secured else {}
    security = StageSecurity.model_validate({"tls": tls})
    layers = AddingLayers(during_step=lambda: time.sleep(0.9))
    with running_stage(layers, security=security) as stage:
        link = leased(stage.address, lost_ms=400, heartbeat_ms=50, tls=tls)
        link.begin(1, step_of(2))
        assert link.run(1, [1], rows_of(2)).activations.hidden.shape == (2, 8)


def test_a_stage_that_never_ends_a_step_is_lost_after_the_step_deadline():
    release = threading.Event()
    with running_stage(AddingLayers(during_step=lambda: release.wait(30))) as stage:
        link = leased(stage.address, step_ms=300, heartbeat_ms=50)
        link.begin(1, step_of(2))
        with pytest.raises(StageLost, match=r"no answer within 0\.3 s"):
            link.run(1, [1], rows_of(2))
        link.close()
        release.set()


def test_a_silent_stage_is_lost_within_a_second():
    """A listener that accepts in the kernel and never says anything, as a frozen process does."""
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        address = f"127.0.0.1:{frozen.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(SplitError, match=r"^stage 127"):
            dialled(stages(address))
        assert time.monotonic() - started < 5


def test_a_closed_connection_is_noticed_before_the_next_step():
    with running_stage() as stage:
        link = leased(stage.address)
    started = time.monotonic()
    with pytest.raises(StageLost, match="shutting down"):
        link.begin(1, step_of(1))
    assert time.monotonic() - started < 0.5


def test_the_next_stage_takes_over_from_one_that_is_gone():
    with running_stage() as second:
        with running_stage() as first:
            both = stages(first.address, second.address)
            assert dialled(both).stage == first.address
        assert dialled(both).stage == second.address


def test_an_engine_waits_for_a_stage_that_loads_and_pings_are_answered_meanwhile():
    backend = AddingLayers()
    backend.loaded.clear()
    with running_stage(backend) as stage:
        threading.Timer(0.6, backend.loaded.set).start()
        assert stages(stage.address, heartbeat_ms=50).connect().stage == stage.address


def test_in_a_hurry_a_stage_that_loads_counts_as_lost():
    backend = AddingLayers()
    backend.loaded.clear()
    with running_stage(backend) as stage:
        with pytest.raises(SplitError, match=r"^stage 127"):
            dialled(stages(stage.address, connect_ms=200))
        backend.loaded.set()


@pytest.mark.parametrize("fact", ["model.weights", "block_tokens", "dtype"])
def test_an_engine_with_another_model_is_refused_and_told_the_difference(fact):
    with running_stage() as stage:
        hello = msgspec.structs.replace(HELLO, facts=FACTS | {fact: "other"})
        with pytest.raises(StageRefused, match=f"{fact}: ours is '{FACTS[fact]}'") as refusal:
            dialled(stages(stage.address, hello=hello))
        assert refusal.value.code == "model"
        assert stage.count("refusals_total", reason="model") == 1


def test_a_second_engine_is_refused_while_all_leases_are_taken():
    with running_stage() as stage:
        first = leased(stage.address)
        with pytest.raises(StageRefused, match="all leases are taken"):
            dialled(stages(stage.address))
        first.begin(1, step_of(1))
        first.run(1, [1], rows_of(1))


@pytest.mark.parametrize(
    ("scope", "claims", "complaint"),
    [
        (None, {}, "a token is needed"),
        ("blocks:read", {}, "lacks the scope stage:run"),
        ("stage:run", {"exp": 1}, "token refused: expired"),
        ("stage:run", {"aud": "somebody"}, "wrong audience"),
    ],
)
def test_without_the_right_token_there_is_no_lease(tmp_path, scope, claims, complaint):
    issuer = Issuer(tmp_path)
    config = StageSecurity(token_keys=issuer.file)
    extra = {}
    if scope is not None:
        (tmp_path / "token").write_text(issuer.token(scope, **claims))
        extra["token_file"] = str(tmp_path / "token")
    with running_stage(security=config) as stage:
        with pytest.raises(StageRefused, match=complaint) as refusal:
            dialled(stages(stage.address, **extra))
        assert refusal.value.code == "access"
        (tmp_path / "token").write_text(issuer.token("stage:run"))
        leased(stage.address, token_file=str(tmp_path / "token"))


def test_with_tls_an_engine_needs_a_certificate_of_the_ca(tmp_path):
    ours = {name: str(path) for name, path in vars(tls_files(tmp_path)).items()}
    with running_stage(security=StageSecurity.model_validate({"tls": ours})) as stage:
        link = leased(stage.address, tls=ours)
        link.begin(1, step_of(32))
        assert torch.equal(link.run(1, [1], rows_of(32)).activations.hidden, rows_of(32).hidden + 1)
        link.close()
        with pytest.raises(SplitError):
            dialled(stages(stage.address))
        wait_for("a free lease", lambda: not stage.backend.leases)
        leased(stage.address, tls=ours)


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET / HTTP/1.1\r\nHost: stage\r\n\r\n" * 2,
        b"\x00" * 64,
        wire.HEADER.pack(b"MCPS", 1, Kind.HELLO, 0, 1 << 30, 0, 0),
        wire.HEADER.pack(b"MCPS", 1, Kind.HELLO, 0, 3, 0, 0) + b"\xc1\xc1\xc1",
        wire.pack_header(Kind.ACTS, 0, 0, 1),
    ],
)
def test_garbage_gets_one_error_and_the_stage_goes_on(rubbish):
    with running_stage() as stage:
        with raw_connection(stage.address) as stranger:
            stranger.sendall(rubbish)
            channel = Channel(stranger)
            message = channel.receive(Patience(total_s=10.0, silence_s=10.0))
            assert message.kind == Kind.ERROR
            assert wire.decode(wire.Error, message.metadata).code == "protocol"
        leased(stage.address)


def test_a_payload_larger_than_the_engine_said_ends_the_lease_before_it_is_read():
    with running_stage() as stage:
        link = leased(stage.address)
        link.begin(1, step_of(5))
        with pytest.raises(StageLost, match=r"payload of \d+ bytes, allowed are"):
            link.run(1, [1], rows_of(4096))
        wait_for("the lease to end", lambda: not stage.backend.leases)
        leased(stage.address)


def test_a_step_out_of_order_ends_the_lease():
    with running_stage() as stage:
        link = leased(stage.address)
        link.begin(5, step_of(1))
        with pytest.raises(StageLost, match="expected STEP of step 1, got STEP of step 5"):
            link.run(5, [1], rows_of(1))


def test_layers_that_fail_end_their_lease_with_an_error_that_tells_nothing_of_the_inside():
    def fail() -> None:
        raise ValueError("secret of the stage")

    with running_stage(AddingLayers(during_step=fail)) as stage:
        link = leased(stage.address)
        link.begin(1, step_of(1))
        with pytest.raises(StageLost, match=r"the step failed \(ValueError\)") as lost:
            link.run(1, [1], rows_of(1))
        assert "secret" not in str(lost.value)
        wait_for("the lease to end", lambda: not stage.backend.leases)


def test_an_engine_that_is_killed_gives_its_lease_back():
    with running_stage() as stage:
        link = leased(stage.address)
        link.begin(1, step_of(4))  # and no activations: it dies in the middle of a step
        link.channel._socket.close()
        wait_for("the lease to end", lambda: not stage.backend.leases)
        assert stage.count("leases") == 0


def test_a_stage_that_stops_says_so():
    with running_stage() as stage:
        link = leased(stage.address)
        link.begin(1, step_of(1))
        stage.server.stop()
        with pytest.raises(StageLost):
            link.run(1, [1], rows_of(1))


def test_a_round_trip_is_measured_without_a_lease_and_who_is_gone_is_left_out():
    with running_stage() as stage:
        both = stages(stage.address, "127.0.0.1:9")
        watch = Watch((stage.address, "127.0.0.1:9"), both.ping, 0.01)
        wait_for("a round trip", lambda: watch.round_trips)
        assert set(watch.round_trips) == {stage.address}
        assert 0 < watch.round_trips[stage.address] < 1
        assert not stage.backend.leases
        watch.close()
