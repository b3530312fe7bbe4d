"""Doctor: can an agent start here, and does its memory fit?"""

import json
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from mcp_vllm.config import Config
from mcp_vllm.doctor.agent_start import check_codec, check_listen, check_socket
from mcp_vllm.doctor.check import Status
from mcp_vllm.doctor.memory import check_ram, check_shared_memory

sys.path.insert(0, str(Path(__file__).parent))
from agents_for_tests import serving


def config(**values: object) -> Config:
    return Config.load(values, environ={})


def listening(address: str, **more: object) -> Config:
    return config(agent={"listen": address}, **more)


def test_a_free_port_is_good() -> None:
    assert check_listen(listening("127.0.0.1:0")).status is Status.OK


def test_a_port_that_is_served_by_our_agent_is_good_and_names_it() -> None:
    health = {"agent_id": "abc123", "version": "0.1.0", "engines": 2}
    with serving({"/healthz": json.dumps(health).encode()}) as address:
        check = check_listen(listening(address))
    assert check.status is Status.OK
    assert "abc123" in check.found


def test_a_port_that_somebody_else_has_is_a_fail() -> None:
    with serving({"/healthz": b"all good"}) as address:
        check = check_listen(listening(address))
    assert (check.status, check.remedy) == (Status.FAIL, "set agent.listen to a free port")


def test_an_address_of_another_machine_is_a_fail() -> None:
    check = check_listen(listening("192.0.2.1:7077", insecure=True))
    assert check.status is Status.FAIL
    assert "192.0.2.1:7077" in check.found


def test_an_address_that_others_reach_is_a_warning() -> None:
    check = check_listen(listening("0.0.0.0:0", insecure=True))
    assert check.status is Status.WARN
    assert "private network" in check.remedy


def test_without_a_socket_of_its_own_the_engine_starts_the_agent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        check = check_socket(config())
        assert check.status is Status.OK
        assert folder in check.found
        assert list(Path(folder).iterdir()) == []


def test_a_runtime_folder_too_deep_for_the_engines_own_agent_is_a_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 80)))
    check = check_socket(config())
    assert check.status is Status.FAIL
    assert "XDG_RUNTIME_DIR" in check.remedy


def test_a_socket_path_that_the_system_cannot_hold_is_a_fail(tmp_path: Path) -> None:
    check = check_socket(config(agent={"socket": str(tmp_path / ("x" * 108))}))
    assert check.status is Status.FAIL
    assert "107 are allowed" in check.found


def test_a_served_socket_is_good_and_an_unserved_one_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    settings = config(agent={"socket": str(path)})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        assert check_socket(settings).status is Status.OK
    check = check_socket(settings)
    assert check.status is Status.WARN
    assert "mcp-vllm agent" in check.remedy


def test_a_socket_folder_that_cannot_be_made_is_a_fail() -> None:
    check = check_socket(config(agent={"socket": "/dev/null/agent.sock"}))
    assert check.status is Status.FAIL


def test_a_codec_that_the_schema_knows_and_this_version_lacks_is_a_fail() -> None:
    assert check_codec(config(codec={"name": "raw"})).status is Status.OK
    broken = config().model_copy(
        update={"codec": config().codec.model_copy(update={"name": "none"})}
    )
    assert check_codec(broken).status is Status.FAIL


def test_a_host_cache_that_does_not_fit_is_a_fail_that_names_both_remedies(tmp_path: Path) -> None:
    assert check_shared_memory(config(host_cache_bytes="1MiB"), tmp_path).status is Status.OK
    check = check_shared_memory(config(host_cache_bytes="1000TiB"), tmp_path)
    assert check.status is Status.FAIL
    assert "host_cache_bytes" in check.remedy
    assert "--shm-size" in check.remedy


@pytest.mark.parametrize(
    ("total_gib", "available_gib", "status"),
    [(16, 8, Status.OK), (16, 3, Status.WARN), (4, 4, Status.FAIL)],
)
def test_memory_is_compared_with_all_that_the_settings_may_take(
    tmp_path: Path, total_gib: int, available_gib: int, status: Status
) -> None:
    check = check_ram(config(), total_gib << 30, available_gib << 30, tmp_path / "none")
    assert check.status is status


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{1 << 30}\n")
    check = check_ram(config(), 16 << 30, 16 << 30, tmp_path / "memory.max")
    assert check.status is Status.FAIL
