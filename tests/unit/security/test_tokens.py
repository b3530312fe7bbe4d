"""Tokens: the right ones say whose they are, every other one is refused with a reason."""

import base64
import hashlib
import hmac
import json
import string
import time

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_security import Issuer, private_pem, public_pem

from mcp_vllm.security.errors import SecurityError
from mcp_vllm.security.tokens import TokenError, TokenFile, TokenVerifier, mint

SECRET = "s" * 40
RSA = generate_private_key(65537, 2048)


@pytest.fixture
def issuer(tmp_path):
    return Issuer(tmp_path)


@pytest.fixture
def verifier(issuer):
    return TokenVerifier(issuer.file, "mcp-vllm", 30)


def refusal(verifier: TokenVerifier, token: str) -> str:
    with pytest.raises(TokenError) as caught:
        verifier.verify(token)
    assert len(token) < 20 or token not in str(caught.value)
    return caught.value.reason


def part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def claims(**others: object) -> dict[str, object]:
    known = {"sub": "x", "aud": "mcp-vllm", "exp": int(time.time()) + 60, "scope": "admin"}
    return {**known, **others}


def test_a_good_token_says_who_what_and_for_which_tenant(issuer, verifier):
    principal = verifier.verify(issuer.token("sessions:read other:scope", tenant="acme"))
    assert (principal.name, principal.tenant) == ("token:test", "acme")
    assert principal.scopes == {"sessions:read"}
    assert principal.sees("acme")
    assert not principal.sees("other")


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({"exp": int(time.time()) - 60}, "expired"),
        ({"nbf": 2**40}, "not valid yet"),
        ({"aud": "another-service"}, "wrong audience"),
        ({"tenant": ""}, "malformed"),
        ({"tenant": None}, "malformed"),
        ({"tenant": ["acme"]}, "malformed"),
        ({"scope": ["admin"]}, "malformed"),
        ({"exp": "soon"}, "malformed"),
        ({"exp": float("inf")}, "malformed"),
        ({"sub": ""}, "malformed"),
    ],
)
def test_a_token_with_a_bad_claim_is_refused(issuer, verifier, others, reason):
    signed = jwt.encode(claims(**others), issuer.key, algorithm="EdDSA", headers={"kid": "a"})
    assert refusal(verifier, signed) == reason


@pytest.mark.parametrize("claim", ["aud", "exp", "sub", "scope"])
def test_a_claim_that_is_missing_is_no_default(issuer, verifier, claim):
    left = {name: value for name, value in claims().items() if name != claim}
    token = jwt.encode(left, issuer.key, algorithm="EdDSA", headers={"kid": "a"})
    assert refusal(verifier, token) == "a claim is missing"


def test_clocks_may_differ_by_the_skew_and_no_more(issuer, verifier):
    now_s = int(time.time())
    assert verifier.verify(issuer.token("admin", exp=now_s - 20))
    assert refusal(verifier, issuer.token("admin", exp=now_s - 40)) == "expired"


@pytest.mark.parametrize("scope", ["sessions:read", "blocks:read sessions:write"])
def test_all_tenants_are_for_admin_and_agents_only(issuer, verifier, scope):
    assert refusal(verifier, issuer.token(scope)) == "neither a tenant nor admin"
    assert verifier.verify(issuer.token(f"admin {scope}")).tenant is None
    assert verifier.verify(issuer.token("blocks:read")).tenant is None


@pytest.mark.parametrize("name", ["none", "None", "NONE"])
def test_an_unsigned_token_is_refused(verifier, name):
    header = part({"alg": name, "typ": "JWT", "kid": "a"})
    assert refusal(verifier, f"{header}.{part(claims())}.") in ("wrong algorithm", "malformed")


def test_a_public_key_is_no_secret(tmp_path):
    """The classic confusion: HS256 with the RSA key that everybody may know."""
    file = tmp_path / "keys.json"
    public = public_pem(RSA)
    file.write_text(json.dumps([{"kid": "r", "algorithm": "RS256", "key": public}]))
    verifier = TokenVerifier(file, "mcp-vllm", 0)
    signed = f"{part({'alg': 'HS256', 'kid': 'r'})}.{part(claims())}"
    digest = hmac.digest(public.encode(), signed.encode(), hashlib.sha256)
    forged = f"{signed}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"
    assert refusal(verifier, forged) == "wrong algorithm"
    good = jwt.encode(claims(), RSA, algorithm="RS256", headers={"kid": "r"})
    assert verifier.verify(good).name == "token:x"
    other = jwt.encode(claims(), RSA, algorithm="RS512", headers={"kid": "r"})
    assert refusal(verifier, other) == "wrong algorithm"


def test_a_secret_works_and_another_one_does_not(tmp_path):
    file = tmp_path / "keys.yaml"
    (tmp_path / "secret").write_text(SECRET + "\n")
    file.write_text("- {kid: h, algorithm: HS256, key_file: secret}\n")
    verifier = TokenVerifier(file, "mcp-vllm", 0)
    assert verifier.verify(jwt.encode(claims(), SECRET, headers={"kid": "h"})).name == "token:x"
    assert refusal(verifier, jwt.encode(claims(), "t" * 40, headers={"kid": "h"})) == (
        "bad signature"
    )


def test_keys_are_rotated_by_kid(issuer, tmp_path):
    verifier = TokenVerifier(issuer.file, "mcp-vllm", 0)
    (tmp_path / "b").mkdir()
    new = Issuer(tmp_path / "b", kid="b")
    assert refusal(verifier, new.token("admin")) == "unknown kid"
    issuer.publish(issuer, new)
    assert verifier.reload()
    assert verifier.verify(new.token("admin"))
    assert verifier.verify(issuer.token("admin"))
    issuer.publish(new)
    assert verifier.reload()
    assert not verifier.reload()
    assert refusal(verifier, issuer.token("admin")) == "unknown kid"
    issuer.file.write_text("[")
    with pytest.raises(SecurityError, match="neither YAML nor JSON"):
        verifier.reload()
    assert verifier.verify(new.token("admin"))


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ([], "no key at all"),
        ([{"kid": "a", "algorithm": "none", "key": ""}], "algorithm must be one of"),
        ([{"kid": "a", "algorithm": "HS256", "key": "short"}], "32 bytes"),
        ([{"kid": "a", "algorithm": "HS256", "key": public_pem(RSA)}], "cannot be the secret"),
        ([{"kid": "a", "algorithm": "EdDSA", "key": public_pem(RSA)}], "Ed25519"),
        ([{"kid": "a", "algorithm": "RS256", "key": private_pem(RSA).decode()}], "public key"),
        ([{"kid": "a", "algorithm": "HS256"}], "either key or key_file"),
        ([{"kid": "a", "algorithm": "HS256", "key_file": "gone"}], "gone"),
        ([{"kid": "a", "algorithm": "HS256", "key": SECRET}] * 2, "the same kid"),
        ([{"kid": "a", "algorithm": "HS256", "kee": SECRET}], "kee"),
        ({"a": 1}, "array"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_refused_without_showing_keys(tmp_path, entries, fault):
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(entries))
    with pytest.raises(SecurityError, match=fault) as caught:
        TokenVerifier(file, "mcp-vllm", 0)
    assert SECRET not in str(caught.value)
    assert "BEGIN" not in str(caught.value)


@given(st.text(max_size=200) | st.text(string.ascii_letters + "._-=", max_size=200))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_no_token_is_refused(verifier, text):
    assert refusal(verifier, text) in ("malformed", "unknown kid", "wrong algorithm")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["sub", "aud", "exp", "scope", "tenant", "nbf", "iat"]),
                       json_values))  # fmt: skip
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_signed_nonsense_is_refused_or_names_a_principal(issuer, verifier, others):
    payload = json.dumps(claims(**others)).encode()
    token = jwt.PyJWS().encode(payload, issuer.key, algorithm="EdDSA", headers={"kid": "a"})
    try:
        principal = verifier.verify(token)
    except TokenError:
        return
    assert principal.tenant is None or 0 < len(principal.tenant) <= 256
    assert principal.name.startswith("token:")


@given(position=st.integers(0, 10_000), letter=st.sampled_from(string.ascii_letters + "-_."))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_letter_of_a_token_can_be_changed(issuer, verifier, position, letter):
    token = issuer.token("sessions:read", tenant="acme")
    # The last letter of base64 holds bits that do not count.
    position %= len(token) - 1
    changed = token[:position] + letter + token[position + 1 :]
    if changed != token:
        refusal(verifier, changed)


def test_a_long_token_is_not_even_parsed(verifier):
    assert refusal(verifier, "a" * 9000) == "too long"


def test_mint_makes_what_is_accepted_and_nothing_else(issuer, verifier, tmp_path):
    key = tmp_path / "signing.pem"
    key.write_bytes(private_pem(issuer.key))
    scopes = frozenset({"sessions:read"})
    token = mint(key, "a", "mcp-vllm", "ann", scopes, "acme", 60)
    assert verifier.verify(token).tenant == "acme"
    with pytest.raises(SecurityError, match="neither a tenant nor admin"):
        mint(key, "a", "mcp-vllm", "ann", scopes, None, 60)
    with pytest.raises(SecurityError, match="unknown scope"):
        mint(key, "a", "mcp-vllm", "ann", frozenset({"everything"}), None, 60)
    for ttl_s in (0, -1, float("nan"), float("inf")):
        with pytest.raises(SecurityError, match="a token lasts"):
            mint(key, "a", "mcp-vllm", "ann", scopes, "acme", ttl_s)
    key.write_bytes(b"short")
    with pytest.raises(SecurityError, match="32 bytes") as caught:
        mint(key, "a", "mcp-vllm", "ann", scopes, "acme", 60)
    assert "short" not in str(caught.value)


def test_the_own_token_is_read_again_when_it_is_replaced(tmp_path):
    file = tmp_path / "token"
    file.write_text("one\n")
    own = TokenFile(file)
    assert (own.token, own.reload()) == ("one", False)
    file.write_text("another\n")
    assert (own.reload(), own.token) == (True, "another")
    file.write_text("two tokens")
    with pytest.raises(SecurityError, match="one token") as caught:
        own.reload()
    assert "two tokens" not in str(caught.value)
    assert own.token == "another"
