"""What `--mcp-split` sets among vLLM's arguments, and what it contradicts."""

import os
from types import SimpleNamespace

import pytest

from mcp_vllm.config import ConfigError
from mcp_vllm.config.split import SplitConfig
from mcp_vllm.vllm_plugin import split_settings
from mcp_vllm.vllm_plugin.shared_cores import share_cores

SPLIT = '{"layers": "4:14", "stages": ["127.0.0.1:7090"]}'


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")  # what is set meanwhile is undone
        monkeypatch.delenv(name)


def test_executor_scheduler_and_eager_mode_are_set_and_the_settings_travel_along():
    args = SimpleNamespace(model="m", additional_config={"theirs": 1})
    split_settings.apply(args, SPLIT)
    assert args.distributed_executor_backend == split_settings.EXECUTOR
    assert args.scheduler_cls == split_settings.SCHEDULER
    assert (args.enforce_eager, args.async_scheduling) == (True, False)
    assert args.additional_config["theirs"] == 1
    travelled = SplitConfig.load(args.additional_config[split_settings.SETTINGS_KEY])
    assert travelled == SplitConfig.load(SPLIT)


def test_a_second_call_changes_nothing():
    args = SimpleNamespace()
    split_settings.apply(args, SPLIT)
    before = dict(vars(args))
    split_settings.apply(args, SPLIT)
    assert vars(args) == before


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"distributed_executor_backend": "ray"}, "--distributed-executor-backend"),
        ({"scheduler_cls": "mine.Scheduler"}, "--scheduler-cls"),
        ({"async_scheduling": True}, "--async-scheduling"),
        ({"kv_transfer_config": SimpleNamespace(kv_connector="lmcache")}, "--kv-connector"),
    ],
)
def test_a_contradiction_names_both_flags(given, flag):
    with pytest.raises(split_settings.SplitFlagError, match=f"--mcp-split contradicts {flag}"):
        split_settings.apply(SimpleNamespace(**given), SPLIT)


def test_the_second_model_runner_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(split_settings.SplitFlagError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        split_settings.apply(SimpleNamespace(), SPLIT)


def test_settings_that_are_not_valid_are_refused_as_such():
    with pytest.raises(ConfigError, match="stages"):
        split_settings.apply(SimpleNamespace(), '{"layers": "4:14"}')


@pytest.mark.parametrize(("given", "used"), [(None, 512), (4096, 4096)])
def test_a_planned_budget_of_tokens_is_used_unless_another_is_given(given, used):
    args = SimpleNamespace(max_num_batched_tokens=given)
    split_settings.apply(args, '{"layers": "1:3", "stages": ["[::1]:7090"], "batch_tokens": 512}')
    assert args.max_num_batched_tokens == used


def test_an_engine_beside_its_stage_lets_the_cores_go_while_it_waits():
    far = '{"layers": "1:3", "stages": ["10.0.0.1:7090"], "insecure": true}'
    split_settings.apply(SimpleNamespace(), far)
    assert "GOMP_SPINCOUNT" not in os.environ
    split_settings.apply(SimpleNamespace(), SPLIT)
    assert os.environ["GOMP_SPINCOUNT"] == "60000"


def test_who_has_said_how_threads_wait_is_obeyed():
    environ = {"OMP_WAIT_POLICY": "active"}
    share_cores(environ)
    assert environ == {"OMP_WAIT_POLICY": "active"}


def test_our_own_connector_goes_together_with_a_split():
    ours = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector="mcp"))
    split_settings.apply(ours, SPLIT)
    assert ours.scheduler_cls == split_settings.SCHEDULER
