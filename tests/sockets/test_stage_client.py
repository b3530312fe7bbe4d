"""The client of a stage's layers over real sockets: what it plays of an engine's scheduler.

The stage's layers add up a session's rows out of its KV blocks (`PagedLease`), so each answer says
whether blocks, positions and replays are right.
"""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_security import Issuer, tls_files
from stages_for_tests import FACTS, WIDTH, AddingLayers, PagedLease, running_stage

from mcp_vllm import MCPClient
from mcp_vllm.client import ApiError
from mcp_vllm.config.errors import ConfigError
from mcp_vllm.config.split import StageSecurity
from mcp_vllm.split.client import StageClient
from mcp_vllm.split.errors import SplitError, StageRefused, StageResourceError, StageTimeout
from mcp_vllm.split.noise import ActivationNoise, PrivacyBudgetSpent
from tests.waiting import wait_for

RANGE = (1, 3)


def layers(**settings: object) -> AddingLayers:
    return AddingLayers(dtype=torch.float32, **settings)  # type: ignore[arg-type]


def rows(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1).expand(-1, WIDTH).contiguous()


def sums(*values: int) -> torch.Tensor:
    return rows(*values).cumsum(0)


def lease_of(backend: AddingLayers) -> PagedLease:
    (lease,) = backend.leases
    assert isinstance(lease, PagedLease)
    return lease


def test_a_session_goes_on_where_it_stopped_beside_others():
    backend = layers()
    with running_stage(backend) as stage, StageClient(stage.address) as client:
        for name, start in (("a", 1), ("b", 100)):
            given_rows = rows(*range(start, start + 9))
            result = client.execute(input_data=given_rows, layer_range=RANGE, session=name)
            assert torch.equal(result, given_rows.cumsum(0))
        for step in range(3):
            result = client.execute(input_data=rows(5), layer_range=RANGE, session="a")
            assert torch.equal(result, sums(*range(1, 10), *[5] * (step + 1))[-1:])
        assert torch.equal(client.execute(input_data=rows(7), layer_range=RANGE), rows(7))
        client.close_session("a")
        result = client.execute(input_data=rows(3), layer_range="1:3", session="a")
        assert torch.equal(result, rows(3)), "a closed session begins anew"
        assert len(lease_of(backend).tables) == 2
    wait_for("the lease to end", lambda: not backend.leases)


def test_many_sessions_share_a_step_and_a_long_input_takes_several():
    backend = layers()
    with running_stage(backend) as stage, StageClient(stage.address, max_tokens=8) as client:
        batch = {"a": rows(*range(1, 12)), "b": rows(50, 60)}
        results = client.open(RANGE).run(batch)
        assert all(torch.equal(results[name], each.cumsum(0)) for name, each in batch.items())
        assert [step.num_tokens for step in lease_of(backend).steps] == [8, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, np.float32])
def test_the_answer_has_the_kind_and_dtype_of_the_input(dtype):
    with running_stage(layers()) as stage, MCPClient(stage.address) as client:
        given_rows = rows(1, 2, 3)
        data = given_rows.numpy() if dtype is np.float32 else given_rows.to(dtype)
        result = client.execute(
            task_type="transformer_layer", input_data=data, layer_range=range(1, 3), session="s"
        )
        assert type(result) is type(data)
        assert result.dtype == data.dtype
        assert np.array_equal(np.asarray(torch.as_tensor(result).float()), sums(1, 2, 3).numpy())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=25))
def test_any_order_of_sessions_gives_each_its_own_sums(calls):
    """24 blocks do not hold four sessions of 40 tokens: idle ones lose theirs, and nothing else."""
    sent: dict[str, list[int]] = {}
    with running_stage(layers()) as stage, StageClient(stage.address) as client:
        for number, count in calls:
            name = f"s{number}"
            mine = sent.setdefault(name, [])
            if len(mine) + count > 40:
                continue
            mine += range(len(mine) + number, len(mine) + number + count)
            given_rows = rows(*mine[-count:])
            result = client.execute(input_data=given_rows, layer_range=RANGE, session=name)
            assert torch.equal(result, sums(*mine)[-count:])


def test_sessions_outlive_a_stage_that_is_gone():
    with running_stage(layers()) as second:
        with running_stage(layers()) as first:
            client = StageClient([first.address, f"mcp://{second.address}"])
            sessions = client.open(RANGE)
            sessions.run({"a": rows(1, 2, 3), "b": rows(10, 20)})
            sessions.run({"a": rows(4)})
        assert torch.equal(sessions.run({"a": rows(5)})["a"], sums(1, 2, 3, 4, 5)[-1:])
        assert torch.equal(sessions.run({"b": rows(30)})["b"], sums(10, 20, 30)[-1:])
        assert torch.equal(sessions.run({"b": rows(1)})["b"], sums(10, 20, 30, 1)[-1:])
        client.close()


def test_a_stage_that_is_lost_in_the_middle_of_a_step_costs_nothing():
    broken = layers(during_step=lambda: (_ for _ in ()).throw(OSError("gone")))
    with (
        running_stage(broken) as first,
        running_stage(layers()) as second,
        StageClient(f"{first.address},{second.address}") as client,
    ):
        result = client.execute(input_data=rows(1, 2), layer_range=RANGE, session="a")
        assert torch.equal(result, sums(1, 2))


def test_a_step_that_takes_too_long_is_tried_again_with_more_patience():
    slow = threading.Event()
    backend = layers(during_step=lambda: slow.wait(0.45))
    with running_stage(backend) as stage:
        with StageClient(stage.address, step_ms=300, heartbeat_ms=50) as client:
            result = client.execute(input_data=rows(1, 2), layer_range=RANGE, session="a")
            assert torch.equal(result, sums(1, 2))
            assert client.open(RANGE).step_s == pytest.approx(0.3 * 1.5, rel=0.6)
            assert client.open(RANGE).step_s > 0.3
        slow.set()


def test_who_never_answers_in_time_is_a_timeout_and_the_session_is_as_before():
    release = threading.Event()
    release.set()
    backend = layers(during_step=lambda: release.wait(30))
    with (
        running_stage(backend) as stage,
        StageClient(stage.address, step_ms=100, heartbeat_ms=50, attempts=1) as client,
    ):
        client.execute(input_data=rows(1), layer_range=RANGE, session="a")
        release.clear()
        with pytest.raises(StageTimeout):
            client.execute(input_data=rows(2), layer_range=RANGE, session="a")
        release.set()
        result = client.execute(input_data=rows(3), layer_range=RANGE, session="a")
        assert torch.equal(result, sums(1, 3)[-1:])


def test_too_many_tokens_for_a_session_or_for_all_blocks_is_one_clear_error():
    with running_stage(layers()) as stage, StageClient(stage.address) as client:
        with pytest.raises(StageResourceError, match=r"would have 41 tokens, .* allows 40"):
            client.execute(input_data=rows(*range(41)), layer_range=RANGE, session="a")
        batch = {name: rows(*range(36)) for name in "ab"}
        with pytest.raises(StageResourceError, match="needs more KV blocks than the"):
            client.open(RANGE).run(batch)
        assert client.open(RANGE).length("a") == 0
        result = client.execute(input_data=rows(2), layer_range=RANGE, session="a")
        assert torch.equal(result, rows(2))


def test_without_a_free_lease_the_client_is_told_so():
    with running_stage(layers()) as stage, StageClient(stage.address) as first:
        first.execute(input_data=rows(1), layer_range=RANGE)
        second = StageClient(stage.address, load_ms=1000)
        with pytest.raises(StageResourceError, match="all leases are taken"):
            second.execute(input_data=rows(1), layer_range=RANGE)


def test_other_layers_or_weights_are_refused_by_name():
    with running_stage(layers()) as stage, StageClient(stage.address) as client:
        with pytest.raises(StageRefused, match="layers 1:4 are wanted, this stage holds 1:3"):
            client.execute(input_data=rows(1), layer_range=(1, 4))
        wrong = client.open(RANGE, {"model.weights": "bbbb"})
        with pytest.raises(StageRefused, match=r"model\.weights: ours is 'aaaa', theirs is 'bbbb'"):
            wrong.run({"a": rows(1)})
        right = client.open(RANGE, {"model.weights": FACTS["model.weights"]})
        assert torch.equal(right.run({"a": rows(1)})["a"], rows(1))


def test_rows_of_another_width_or_kind_are_refused():
    with running_stage(layers()) as stage, StageClient(stage.address) as client:
        with pytest.raises(ValueError, match=r"shape \(2, 3\), not \(tokens, 8\)"):
            client.execute(input_data=torch.zeros(2, 3), layer_range=RANGE)
        with pytest.raises(ValueError, match="not hidden states"):
            client.execute(input_data=torch.zeros(2, 8, dtype=torch.long), layer_range=RANGE)
        with pytest.raises(ValueError, match="only 'transformer_layer'"):
            client.execute(task_type="mlp", input_data=rows(1), layer_range=RANGE)


def test_an_endpoint_is_an_agent_or_a_stage_and_says_so():
    with MCPClient("127.0.0.1:9", load_ms=1000, connect_ms=100) as client:
        with pytest.raises(ApiError, match="is a stage"):
            client.sessions()
        with pytest.raises(SplitError, match="no stage can be used"):
            client.execute(input_data=rows(1), layer_range=RANGE)
    with MCPClient("http://127.0.0.1:9") as client, pytest.raises(ApiError, match="is an agent"):
        client.execute(input_data=rows(1), layer_range=RANGE)
    with pytest.raises(ValueError, match='known are None, "none" and "fp8"'):
        MCPClient("127.0.0.1:9", compression="snappy")
    with pytest.raises(ConfigError, match="in the clear"):
        MCPClient("gpu.example:7090")


def test_a_client_presents_its_key_and_its_certificate(tmp_path):
    issuer = Issuer(tmp_path)
    ours = {name: str(path) for name, path in vars(tls_files(tmp_path)).items()}
    secured = StageSecurity.model_validate({"tls": ours, "token_keys": str(issuer.file)})
    key = issuer.token("stage:run")
    with running_stage(layers(), security=secured) as stage:
        with MCPClient(stage.address, auth_key=key, tls=ours) as client:
            result = client.execute(input_data=rows(1, 2), layer_range=RANGE)
            assert torch.equal(result, sums(1, 2))
        client = MCPClient(stage.address, tls=ours)
        with pytest.raises(StageRefused, match="a token is needed"):
            client.execute(input_data=rows(1), layer_range=RANGE)


def test_a_session_can_be_cut_and_copied():
    backend = layers()
    with running_stage(backend) as stage, StageClient(stage.address) as client:
        sessions = client.open(RANGE)
        sessions.run({"a": rows(*range(1, 10))})
        sessions.truncate("a", 6)
        sessions.fork("a", "b")
        results = sessions.run({"a": rows(100), "b": rows(200)})
        assert torch.equal(results["a"], sums(*range(1, 7), 100)[-1:])
        assert torch.equal(results["b"], sums(*range(1, 7), 200)[-1:])
        (last,) = lease_of(backend).steps[-1:]
        # What was cut goes on in its blocks; the copy is computed from its beginning.
        assert sorted(count for _, count in last.scheduled) == [1, 7]
        sessions.abandon("a")
        gc.collect()
        sessions.run({"b": rows(1)})
        assert len(lease_of(backend).tables) == 1


def test_noise_is_sent_once_and_its_epsilon_adds_up_until_it_is_spent():
    noise = ActivationNoise(clip_norm=10.0, row_epsilon=1.0, max_epsilon=2.0)
    with running_stage(layers()) as second:
        with running_stage(layers()) as first:
            client = StageClient([first.address, second.address], noise=noise)
            before = client.execute(input_data=rows(1, 2), layer_range=RANGE, session="a")
            assert not torch.allclose(before, sums(1, 2), atol=1.0)
            assert client.epsilon("a") == noise.epsilon(2) < 2.0
        sessions = client.open(RANGE)
        kept = torch.cat(sessions._sessions["a"].inputs)
        with pytest.raises(PrivacyBudgetSpent, match="max_epsilon is 2"):
            client.execute(input_data=rows(*range(9)), layer_range=RANGE, session="a")
        after = client.execute(input_data=rows(3), layer_range=RANGE, session="a")
        replayed = torch.cat(sessions._sessions["a"].inputs)
        assert torch.equal(replayed[:2], kept), "a replay sends the same noisy rows"
        assert torch.allclose(after, replayed.sum(0, keepdim=True), atol=1e-3)
        assert client.epsilon("a") == noise.epsilon(3)
        client.close()
