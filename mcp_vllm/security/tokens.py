"""Bearer tokens: JWTs signed by one of our keys, with an audience, an end and a scope."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from mcp_vllm.security.errors import SecurityError
from mcp_vllm.security.file_stamp import Stamp, stamp
from mcp_vllm.security.principal import ADMIN, BLOCKS_READ, SCOPES, STAGE_RUN, Principal
from mcp_vllm.security.token_keys import MIN_RSA_BITS, MIN_SECRET_BYTES, read_token_keys

MAX_TOKEN_CHARS = 8192
MAX_NAME_CHARS = 256
MAX_TTL_S = 366 * 86400


class TokenError(SecurityError):
    """A token that is not accepted. `reason` is one of few phrases, for the log; never the token,
    and nothing that the token says."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"token refused: {reason}")
        self.reason = reason


# First match wins: some of PyJWT's errors are kinds of others.
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (jwt.ExpiredSignatureError, "expired"),
    (jwt.ImmatureSignatureError, "not valid yet"),
    (jwt.InvalidAudienceError, "wrong audience"),
    (jwt.MissingRequiredClaimError, "a claim is missing"),
    (jwt.InvalidAlgorithmError, "wrong algorithm"),
    (jwt.InvalidSignatureError, "bad signature"),
)


class TokenVerifier:
    """Says whose a token is. The keys are read again when their files change."""

    def __init__(self, path: Path, audience: str, clock_skew_s: float) -> None:
        """Raises SecurityError when the keys cannot be used."""
        self._path = path
        self._audience = audience
        self._clock_skew_s = clock_skew_s
        self._keys, self._stamp = read_token_keys(path)

    def reload(self) -> bool:
        """Whether the keys had changed. Raises SecurityError: the old ones stay."""
        keys, present = read_token_keys(self._path)
        changed = present != self._stamp
        self._keys, self._stamp = keys, present
        return changed

    def verify(self, token: str) -> Principal:
        """Whose token it is. Raises TokenError."""
        if len(token) > MAX_TOKEN_CHARS:
            raise TokenError("too long")
        return _principal(self._claims(token))

    def _claims(self, token: str) -> Mapping[str, Any]:
        try:
            key = self._keys.get(str(jwt.get_unverified_header(token).get("kid")))
            if key is None:
                raise TokenError("unknown kid")
            claims: dict[str, Any] = jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm],
                audience=self._audience,
                leeway=self._clock_skew_s,
                options={"require": ["aud", "exp", "sub", "scope"]},
            )
        except TokenError:
            raise
        except Exception as error:  # a stranger's input: whatever it provokes is a refusal
            raise TokenError(_reason(error)) from None
        return claims


def _reason(error: Exception) -> str:
    return next((phrase for kind, phrase in _REASONS if isinstance(error, kind)), "malformed")


def _principal(claims: Mapping[str, Any]) -> Principal:
    subject, scope, tenant = claims["sub"], claims["scope"], claims.get("tenant")
    if not _is_name(subject) or not isinstance(scope, str):
        raise TokenError("malformed")
    if "tenant" in claims and not _is_name(tenant):
        raise TokenError("malformed")
    scopes = frozenset(scope.split(" ")) & frozenset(SCOPES)
    if tenant is None and ADMIN not in scopes and not scopes <= {BLOCKS_READ, STAGE_RUN}:
        raise TokenError("neither a tenant nor admin")
    return Principal(f"token:{subject}", scopes, tenant)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARS


class TokenFile:
    """The token that we present ourselves; whoever renews it replaces the file."""

    def __init__(self, path: Path) -> None:
        """Raises SecurityError when the file holds no token."""
        self._path = path
        self._load()

    def reload(self) -> bool:
        """Whether the file had changed. Raises SecurityError: the old token stays."""
        if self._stamp_now() == self._stamp:
            return False
        self._load()
        return True

    def _load(self) -> None:
        present = self._stamp_now()
        self.token, self._stamp = read_token(self._path), present

    def _stamp_now(self) -> Stamp:
        try:
            return stamp([self._path])
        except OSError as error:
            raise SecurityError(f"token file: {error}") from error


def read_token(path: Path) -> str:
    """The one token in a file. Raises SecurityError."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a token"
        raise SecurityError(f"token file {path}: {reason}") from None
    if not token or not token.isprintable() or " " in token or len(token) > MAX_TOKEN_CHARS:
        raise SecurityError(f"token file {path}: must hold one token and nothing else")
    return token


def mint(
    key_file: Path,
    kid: str,
    audience: str,
    subject: str,
    scopes: frozenset[str],
    tenant: str | None,
    ttl_s: float,
) -> str:
    """A token signed with the key of `key_file`: a private key in PEM, else an HS256 secret.

    Raises:
        SecurityError: the key cannot be used, or our own agents would refuse the token.
    """
    unknown = sorted(scopes - frozenset(SCOPES))
    if unknown:
        raise SecurityError(f"unknown scope {unknown[0]} (known: {', '.join(SCOPES)})")
    if not 1 <= ttl_s <= MAX_TTL_S:
        raise SecurityError(f"a token lasts from a second to {MAX_TTL_S // 86400} days")
    claims: dict[str, object] = {
        "sub": subject,
        "scope": " ".join(sorted(scopes)),
        "aud": audience,
        "iat": int(time.time()),
        "exp": int(time.time() + ttl_s),
    }
    if tenant is not None:
        claims["tenant"] = tenant
    _principal(claims)
    key, algorithm = _signing_key(key_file)
    return jwt.encode(claims, key, algorithm=algorithm, headers={"kid": kid})


def _signing_key(path: Path) -> tuple[Any, str]:
    try:
        material = path.read_bytes().strip()
        if not material.startswith(b"-----BEGIN"):
            return _signing_secret(path, material), "HS256"
        key = load_pem_private_key(material, password=None)
    except OSError as error:
        raise SecurityError(f"signing key {path}: {error.strerror}") from error
    except (ValueError, TypeError):
        raise SecurityError(f"signing key {path}: not a private key without a password") from None
    if isinstance(key, Ed25519PrivateKey):
        return key, "EdDSA"
    if isinstance(key, RSAPrivateKey) and key.key_size >= MIN_RSA_BITS:
        return key, "RS256"
    raise SecurityError(f"signing key {path}: must be Ed25519, RSA of 2048 bits, or a secret")


def _signing_secret(path: Path, secret: bytes) -> bytes:
    if len(secret) < MIN_SECRET_BYTES:
        raise SecurityError(f"signing key {path}: a secret needs {MIN_SECRET_BYTES} bytes")
    return secret
