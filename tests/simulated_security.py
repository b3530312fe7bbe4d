"""Keys, tokens and certificates for tests of agents that want to know who asks."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from simulated import settings

from mcp_vllm.config import Config
from mcp_vllm.security.certificates import ca_in, write_host_files
from mcp_vllm.security.tls import TlsFiles

AUDIENCE = "mcp-vllm"
HOST = "127.0.0.1"


def public_pem(key: Any) -> str:
    public = key.public_key()
    return public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()


def private_pem(key: Any) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


class Issuer:
    """Who signs tokens, and the key file that agents verify them with."""

    def __init__(self, folder: Path, kid: str = "a") -> None:
        self.kid = kid
        self.key = Ed25519PrivateKey.generate()
        self.file = folder / "token-keys.yaml"
        self.publish(self)

    def publish(self, *issuers: Issuer) -> None:
        """Let the file name the keys of these."""
        entries = [
            {"kid": each.kid, "algorithm": "EdDSA", "key": public_pem(each.key)} for each in issuers
        ]
        self.file.write_text(json.dumps(entries))

    def token(self, scope: str, tenant: str | None = None, **claims: object) -> str:
        known = {"sub": "test", "aud": AUDIENCE, "exp": int(time.time()) + 600, "scope": scope}
        if tenant is not None:
            known["tenant"] = tenant
        known.update(claims)
        headers = {"kid": self.kid}
        return jwt.encode(known, self.key, algorithm="EdDSA", headers=headers)


def tls_files(folder: Path, host: str = HOST) -> TlsFiles:
    """A certificate for `host` by the CA of the folder."""
    certificate, key = write_host_files(folder, ca_in(folder), host, days=1)
    return TlsFiles(certificate, key, folder / "ca.pem")


@dataclass
class SecuredSettings:
    """Settings of an agent with these files."""

    tls: TlsFiles | None = None
    token_keys: Path | None = None
    own_token_file: Path | None = None
    audit_file: Path | None = None
    seal_keys: Path | None = None
    clock_skew_s: int = 30

    def config(self, *peers: str, **agent: object) -> Config:
        security: dict[str, object] = {
            "token_keys": self.token_keys,
            "own_token_file": self.own_token_file,
            "audit_file": self.audit_file,
            "seal_keys": self.seal_keys,
            "clock_skew_s": self.clock_skew_s,
        }
        if self.tls is not None:
            security["tls"] = vars(self.tls)
        plain = settings(*peers, **agent).model_dump()
        return Config.model_validate({**plain, "security": security})


def seal_keys(folder: Path, *entries: str | tuple[str, str], name: str = "seal-keys.yaml") -> Path:
    """A key file; entries are ids of master keys, or (id, tenant). An id always means one key."""
    listed = []
    for entry in entries:
        key_id, tenant = entry if isinstance(entry, tuple) else (entry, None)
        key = folder / f"{key_id}.key"
        if not key.exists():
            key.write_text(os.urandom(32).hex() + "\n")
        listed.append({"id": key_id, "key_file": key.name} | ({"tenant": tenant} if tenant else {}))
    path = folder / name
    path.write_text(json.dumps(listed))
    return path


def audit_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
