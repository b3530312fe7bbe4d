"""Doctor: are the peers there, quick, and compatible?"""

import socket
import sys
import time
from pathlib import Path

from mcp_vllm.config import Config
from mcp_vllm.doctor.check import Check, Status
from mcp_vllm.doctor.peers import check_peers

sys.path.insert(0, str(Path(__file__).parent))
from agents_for_tests import hello, serving

GEMMA = {"model.config": "gemma", "model.weights": "g", "dtype": "bfloat16", "vllm": "0.32"}
GEMMA_F32 = {"model.config": "gemma", "model.weights": "g", "dtype": "float32", "vllm": "0.32"}
LLAMA = {"model.config": "llama", "model.weights": "l", "dtype": "bfloat16", "vllm": "0.32"}


def check(ours: bytes | None, theirs: bytes, lookup_ms: int = 60_000) -> Check:
    """The verdict on a peer that says `theirs`, while our own agent says `ours`."""
    answers = {} if ours is None else {"/v1/hello": ours}
    with serving(answers) as own, serving({"/v1/hello": theirs}) as peer:
        agent = {"listen": own, "lookup_ms": lookup_ms}
        (verdict,) = check_peers(Config.load({"peers": [peer], "agent": agent}, environ={}))
    return verdict


def test_without_peers_there_is_nothing_to_ask() -> None:
    (verdict,) = check_peers(Config.load(environ={}))
    assert verdict.status is Status.OK


def test_peers_behind_a_name_are_asked_too_but_not_this_host_itself() -> None:
    ours, theirs = {"/v1/hello": hello("us", GEMMA)}, {"/v1/hello": hello("them", GEMMA)}
    with serving(ours) as own, serving(theirs) as peer:
        agent = {"listen": own, "lookup_ms": 60_000}
        names = [f"localhost:{address.rsplit(':', 1)[1]}" for address in (own, peer)]
        tree = {"discovery": {"dns": names}, "agent": agent}
        verdicts = check_peers(Config.load(tree, environ={}))
    by_title = {verdict.name: verdict for verdict in verdicts}
    assert [each.status for each in verdicts[:2]] == [Status.OK] * 2, "both names are known"
    assert by_title[f"peer {peer}"].status is Status.OK
    assert f"peer {own}" not in by_title


def test_a_name_that_nobody_knows_is_a_fail() -> None:
    tree = {"discovery": {"dns": ["agents.invalid:7077"]}}
    (verdict,) = check_peers(Config.load(tree, environ={}))
    assert (verdict.name, verdict.status) == ("discovery.dns agents.invalid:7077", Status.FAIL)


def test_a_registry_that_does_not_answer_is_a_fail() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{nobody.getsockname()[1]}/0"
        tree = {"discovery": {"registry": url}}
        (verdict,) = check_peers(Config.load(tree, environ={}))
    assert (verdict.name, verdict.status) == ("discovery.registry", Status.FAIL)


def test_a_peer_with_the_same_engine_is_good() -> None:
    verdict = check(hello("us", LLAMA, GEMMA), hello("them", GEMMA))
    assert verdict.status is Status.OK
    assert "1 of 2" in verdict.found


def test_a_peer_with_another_engine_is_a_fail_that_names_the_first_field() -> None:
    verdict = check(hello("us", GEMMA), hello("them", LLAMA, GEMMA_F32))
    assert verdict.status is Status.FAIL
    assert "dtype: ours is 'bfloat16', theirs is 'float32'" in verdict.found


def test_a_peer_slower_than_a_lookup_may_be_is_a_warning() -> None:
    # 0.8 of 1 ms is less than any answer of this test's server takes.
    verdict = check(hello("us", GEMMA), hello("them", GEMMA), lookup_ms=1)
    assert verdict.status in (Status.WARN, Status.OK)
    if verdict.status is Status.WARN:
        assert "agent.lookup_ms" in verdict.remedy


def test_without_engines_to_compare_a_reachable_peer_is_a_warning() -> None:
    for ours, theirs, where in (
        (None, hello("them", GEMMA), "here"),
        (hello("us"), hello("them", GEMMA), "here"),
        (hello("us", GEMMA), hello("them"), "there"),
    ):
        verdict = check(ours, theirs)
        assert verdict.status is Status.WARN
        assert f"connected {where} yet" in verdict.found


def test_a_peer_of_another_version_is_a_fail() -> None:
    verdict = check(None, hello("them", version=7))
    assert verdict.status is Status.FAIL
    assert "version 7" in verdict.found


def test_a_peer_that_is_our_own_agent_is_a_fail() -> None:
    verdict = check(hello("us", GEMMA), hello("us", GEMMA))
    assert verdict.status is Status.FAIL
    assert "own agent" in verdict.found


def test_what_is_no_agent_is_a_fail() -> None:
    assert check(None, b"<html>hello</html>").status is Status.FAIL
    with serving({}) as peer:
        (verdict,) = check_peers(Config.load({"peers": [peer]}, environ={}))
    assert verdict.status is Status.FAIL
    assert "404" in verdict.found


def test_a_peer_that_is_down_is_a_fail() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (verdict,) = check_peers(Config.load({"peers": [address]}, environ={}))
    assert verdict.status is Status.FAIL


def test_peers_that_accept_and_never_answer_cost_one_deadline_together() -> None:
    with socket.socket() as one, socket.socket() as other:
        addresses = []
        for mute in (one, other):
            mute.bind(("127.0.0.1", 0))
            mute.listen(8)
            addresses.append(f"127.0.0.1:{mute.getsockname()[1]}")
        started_s = time.monotonic()
        verdicts = check_peers(Config.load({"peers": addresses}, environ={}), deadline_s=0.5)
        elapsed_s = time.monotonic() - started_s
    assert [verdict.found for verdict in verdicts] == ["no answer within 0.5 s"] * 2
    assert elapsed_s < 5
