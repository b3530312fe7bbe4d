"""The keys that blocks are sealed with, from a YAML or JSON file; the first that fits seals.

    - id: 2026b
      key_file: 2026b.key    # 64 hexadecimal digits, beside this file
    - id: acme-1
      tenant: acme
      key_file: acme-1.key

An entry without a tenant is a master key, for every tenant; one with a tenant is for that tenant.
What encrypts is derived from it for each tenant (HKDF-SHA256), so what one tenant's frames are
encrypted with says nothing about another's. Entries further down only open what they once sealed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import yaml
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mcp_vllm.security.errors import SecurityError
from mcp_vllm.security.file_stamp import Stamp, stamp
from mcp_vllm.security.xaes import KEY_BYTES

MAX_KEY_ID_CHARS = 16
_PURPOSE = b"mcp_vllm sealed frames, version 1: "


class TenantKeys(NamedTuple):
    """Of one tenant, 32 bytes each: what frames are encrypted with, and what nonces come from."""

    encryption: bytes
    nonces: bytes


@dataclass(frozen=True)
class SealKey:
    """`tenant`: whose key it is; None: a master key, for all."""

    key_id: str
    tenant: str | None
    secret: bytes = field(repr=False)

    def of_tenant(self, tenant: str) -> TenantKeys:
        info = _PURPOSE + tenant.encode()
        derived = HKDF(SHA256(), 2 * KEY_BYTES, salt=None, info=info).derive(self.secret)
        return TenantKeys(derived[:KEY_BYTES], derived[KEY_BYTES:])


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    id: Annotated[
        str, msgspec.Meta(min_length=1, max_length=MAX_KEY_ID_CHARS, pattern=r"\A[A-Za-z0-9._-]+\Z")
    ]
    key_file: str
    tenant: str | None = None


def read_seal_keys(path: Path) -> tuple[Sequence[SealKey], Stamp]:
    """The keys in the order of the file, and the stamp of all files that they came from.

    Raises:
        SecurityError: a file cannot be used; names it and the `id`, never what is in it.
    """
    try:
        entries = msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), list[_Entry])
        present = stamp([path, *(path.parent / each.key_file for each in entries)])
        keys = [_key(path, each) for each in entries]
    except OSError as error:
        raise SecurityError(f"seal keys: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError):
        raise SecurityError(f"seal keys {path}: neither YAML nor JSON") from None
    except msgspec.ValidationError as error:
        raise SecurityError(f"seal keys {path}: {error}") from None
    if not keys or len({key.key_id for key in keys}) < len(keys):
        raise SecurityError(f"seal keys {path}: no key at all, or two with the same id")
    return keys, present


def _key(path: Path, entry: _Entry) -> SealKey:
    try:
        secret = bytes.fromhex((path.parent / entry.key_file).read_text(encoding="ascii").strip())
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES:
        raise SecurityError(
            f"seal keys {path}, id {entry.id}: {entry.key_file} must hold 64 hexadecimal digits "
            "(openssl rand -hex 32)"
        )
    return SealKey(entry.id, entry.tenant, secret)
