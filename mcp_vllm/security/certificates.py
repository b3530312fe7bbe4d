"""A small CA for tests and private networks: it signs certificates for agents and clients.

Keys are EC P-256, files have mode 0600, and nothing is ever overwritten.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mcp_vllm.config.address import Address
from mcp_vllm.security.errors import SecurityError

CA_DAYS = 3650
# Clocks of hosts differ; a certificate made here must be valid there at once.
BACKDATED = timedelta(hours=1)


@dataclass(frozen=True)
class Ca:
    """A CA that can sign."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def ca_in(folder: Path) -> Ca:
    """The CA of a folder (`ca.pem`, `ca-key.pem`), made if need be. Raises SecurityError."""
    certificate, key = folder / "ca.pem", folder / "ca-key.pem"
    if certificate.exists() or key.exists():
        return _read_ca(certificate, key)
    made = _new_ca()
    _write_private(key, _pem_of(made.key))
    _write_private(certificate, made.certificate.public_bytes(serialization.Encoding.PEM))
    return made


def write_host_files(folder: Path, ca: Ca, host: str, days: int) -> tuple[Path, Path]:
    """A certificate for a host name or IP address, and its key: `HOST.pem`, `HOST-key.pem`.

    Raises:
        SecurityError: no such host name can be, or one of the files exists.
    """
    name = _checked_host(host)
    files = folder / f"{name}.pem", folder / f"{name}-key.pem"
    for path in files:
        if path.exists():
            raise SecurityError(f"{path} exists already and is not overwritten")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _host_certificate(ca, key.public_key(), name, days)
    _write_private(files[1], _pem_of(key))
    _write_private(files[0], certificate.public_bytes(serialization.Encoding.PEM))
    return files


def _checked_host(host: str) -> str:
    """One spelling of it, which is also safe as a file's name."""
    try:
        return Address.parse(f"[{host}]:0" if ":" in host else f"{host}:0").host
    except ValueError:
        raise SecurityError(f"{host!a} is neither a host name nor an IP address") from None


def _new_ca() -> Ca:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("mcp_vllm CA")
    builder = _builder(name, name, key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    return Ca(builder.sign(key, hashes.SHA256()), key)


def _host_certificate(
    ca: Ca, public_key: ec.EllipticCurvePublicKey, host: str, days: int
) -> x509.Certificate:
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    return (
        _builder(_name(host), ca.certificate.subject, public_key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative_name(host)]), critical=False)
        .add_extension(issuer_key, critical=False)
        .sign(ca.key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    # The field holds 64 characters; what counts for a host is its alternative name.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _read_ca(certificate: Path, key: Path) -> Ca:
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
        present = x509.load_pem_x509_certificate(certificate.read_bytes())
    except OSError as error:
        raise SecurityError(f"the CA in {certificate.parent}: {error}") from error
    except (ValueError, TypeError):
        raise SecurityError(f"{certificate} and {key}: not a CA in PEM") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise SecurityError(f"{key}: not a key that this command made")
    return Ca(present, private)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write_private(path: Path, content: bytes) -> None:
    """Raises SecurityError when the file exists or cannot be written."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SecurityError(f"{path} exists already and is not overwritten") from None
    except OSError as error:
        raise SecurityError(f"{path}: {error.strerror}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
