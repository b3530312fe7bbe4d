"""The keys that tokens are verified with, by `kid`, from a YAML or JSON file.

    - kid: 2026-a
      algorithm: EdDSA
      key_file: 2026-a.pem   # the public key, beside this file

`algorithm` is HS256, RS256 or EdDSA; `key` holds the key itself (PEM; for HS256 the secret).
A key accepts its own algorithm only, whatever a token's header claims.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import yaml
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from mcp_vllm.security.errors import SecurityError
from mcp_vllm.security.file_stamp import Stamp, stamp

ALGORITHMS = ("HS256", "RS256", "EdDSA")
MIN_SECRET_BYTES = 32
MIN_RSA_BITS = 2048

PublicKey = bytes | RSAPublicKey | Ed25519PublicKey


@dataclass(frozen=True)
class TokenKey:
    """`key` verifies signatures of `algorithm`, and no other."""

    algorithm: str
    key: PublicKey


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    kid: str
    algorithm: str
    key: str | None = None
    key_file: str | None = None


def read_token_keys(path: Path) -> tuple[Mapping[str, TokenKey], Stamp]:
    """The keys by `kid`, and the stamp of all files that they came from.

    Raises:
        SecurityError: the file or one of its keys cannot be used; names the file and the `kid`.
    """
    try:
        entries = msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), list[_Entry])
        files = [path, *(path.parent / each.key_file for each in entries if each.key_file)]
        present = stamp(files)
        keys = {each.kid: _key(path, each) for each in entries}
    except OSError as error:
        raise SecurityError(f"token keys: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError):
        raise SecurityError(f"token keys {path}: neither YAML nor JSON") from None
    except msgspec.ValidationError as error:
        raise SecurityError(f"token keys {path}: {error}") from None
    if not keys or len(keys) < len(entries):
        raise SecurityError(f"token keys {path}: no key at all, or two with the same kid")
    return keys, present


def _key(path: Path, entry: _Entry) -> TokenKey:
    where = f"token keys {path}, kid {entry.kid!a}"
    if entry.algorithm not in ALGORITHMS:
        raise SecurityError(f"{where}: algorithm must be one of {', '.join(ALGORITHMS)}")
    if (entry.key is None) == (entry.key_file is None):
        raise SecurityError(f"{where}: give either key or key_file")
    if entry.key_file is not None:
        material = (path.parent / entry.key_file).read_bytes()
    else:
        material = (entry.key or "").encode()
    if entry.algorithm == "HS256":
        return TokenKey("HS256", _secret(where, material))
    return TokenKey(entry.algorithm, _public(where, entry.algorithm, material))


def _secret(where: str, material: bytes) -> bytes:
    secret = material.strip()
    if secret.startswith(b"-----BEGIN"):
        raise SecurityError(f"{where}: a PEM key cannot be the secret of HS256")
    if len(secret) < MIN_SECRET_BYTES:
        raise SecurityError(f"{where}: the secret needs {MIN_SECRET_BYTES} bytes at least")
    return secret


def _public(where: str, algorithm: str, material: bytes) -> RSAPublicKey | Ed25519PublicKey:
    try:
        key = load_pem_public_key(material)
    except (ValueError, UnsupportedAlgorithm):
        raise SecurityError(f"{where}: not a public key in PEM") from None
    if algorithm == "RS256" and isinstance(key, RSAPublicKey) and key.key_size >= MIN_RSA_BITS:
        return key
    if algorithm == "EdDSA" and isinstance(key, Ed25519PublicKey):
        return key
    raise SecurityError(f"{where}: {algorithm} needs an RSA key of 2048 bits or an Ed25519 key")
