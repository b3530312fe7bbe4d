import pytest

from mcp_vllm.session.manifest import (
    MAX_NAME_CHARS,
    SessionKey,
    SessionNameError,
    SessionRegistry,
    checked_name,
)

ALICE, BOB, CAROL = (SessionKey("default", name) for name in ("alice", "bob", "carol"))


def test_a_turn_replaces_the_chain_and_keeps_when_the_session_began() -> None:
    sessions = SessionRegistry(10)
    sessions.record_turn(ALICE, b"n", [[b"1"], [b"2"]], 16, now_s=1.0)
    sessions.record_turn(ALICE, b"n", [[b"1", b"3"], [b"4"]], 40, now_s=2.0)
    manifest = sessions.get(ALICE)
    assert manifest is not None
    assert (manifest.turns, manifest.created_s, manifest.last_used_s) == (2, 1.0, 2.0)
    assert manifest.chains == [[b"1", b"3"], [b"4"]]
    assert (manifest.num_chunks, manifest.num_tokens, len(sessions)) == (3, 40, 1)


def test_the_session_used_longest_ago_leaves_first_and_a_look_is_no_use() -> None:
    sessions = SessionRegistry(2)
    for now_s, key in enumerate((ALICE, BOB, ALICE)):
        sessions.record_turn(key, b"n", [[b"1"]], 16, float(now_s))
    sessions.get(BOB)
    sessions.record_turn(CAROL, b"n", [[b"1"]], 16, 4.0)
    assert {manifest.key for manifest in sessions} == {ALICE, CAROL}
    assert sessions.get(BOB) is None


def test_tenants_never_share_a_session() -> None:
    sessions = SessionRegistry(10)
    sessions.record_turn(SessionKey("a", "s"), b"n", [[b"1"]], 16, 1.0)
    assert sessions.get(SessionKey("b", "s")) is None


def test_what_the_caller_does_to_its_lists_later_does_not_reach_the_manifest() -> None:
    sessions = SessionRegistry(10)
    chain = [b"1"]
    sessions.record_turn(ALICE, b"n", [chain], 16, 1.0)
    chain.append(b"2")
    manifest = sessions.get(ALICE)
    assert manifest is not None
    assert manifest.chains == [[b"1"]]


@pytest.mark.parametrize("value", [None, 7, b"bytes", "", "x" * (MAX_NAME_CHARS + 1), "a\nb", "\0"])
def test_a_bad_name_is_refused_and_the_refusal_says_which(value: object) -> None:
    with pytest.raises(SessionNameError, match="session_id"):
        checked_name("session_id", value)


@pytest.mark.parametrize("value", ["a", "x" * MAX_NAME_CHARS, "Grüße 東京", "../../etc/passwd"])
def test_any_printable_text_is_a_name(value: str) -> None:
    assert checked_name("tenant", value) == value
