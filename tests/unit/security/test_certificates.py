"""Certificates made for tests and private networks, and the contexts that use them."""

import os
import shutil
import ssl

import pytest
from cryptography import x509
from simulated_security import tls_files

from mcp_vllm.security.certificates import ca_in, write_host_files
from mcp_vllm.security.errors import SecurityError
from mcp_vllm.security.tls import Tls


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str = "127.0.0.1") -> dict:
    """The server's view of the client's certificate, without sockets. Raises ssl.SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[1].getpeercert()


def test_files_are_private_and_never_overwritten(tmp_path):
    files = tls_files(tmp_path)
    for path in tmp_path.iterdir():
        assert os.stat(path).st_mode & 0o777 == 0o600
    before = files.key.read_bytes()
    with pytest.raises(SecurityError, match="not overwritten"):
        write_host_files(tmp_path, ca_in(tmp_path), "127.0.0.1", 1)
    files.certificate.unlink()
    with pytest.raises(SecurityError, match="not overwritten"):
        write_host_files(tmp_path, ca_in(tmp_path), "127.0.0.1", 1)
    assert files.key.read_bytes() == before


@pytest.mark.parametrize("host", ["../evil", "a/b", "", "a b", "-x", "*.example.org", "a\0b"])
def test_a_name_that_no_host_has_is_refused(tmp_path, host):
    with pytest.raises(SecurityError, match="neither a host name"):
        write_host_files(tmp_path, ca_in(tmp_path), host, 1)


@pytest.mark.parametrize("host", ["gpu-1.example.org", "192.0.2.1", "2001:db8::1"])
def test_names_and_addresses_are_alternative_names(tmp_path, host):
    certificate, _ = write_host_files(tmp_path, ca_in(tmp_path), host, 1)
    parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
    names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(each.value) for each in names] == [host]


def test_both_sides_see_certificates_of_the_same_ca(tmp_path):
    tls = Tls(tls_files(tmp_path))
    assert handshake(tls.client, tls.server)["subject"] == ((("commonName", "127.0.0.1"),),)


def test_another_ca_another_name_and_an_old_protocol_are_refused(tmp_path):
    ours, theirs = Tls(tls_files(tmp_path / "a")), Tls(tls_files(tmp_path / "b"))
    with pytest.raises(ssl.SSLError):
        handshake(theirs.client, ours.server)
    with pytest.raises(ssl.SSLError):
        handshake(ours.client, ours.server, "192.0.2.9")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(tmp_path / "a" / "ca.pem")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        handshake(old, ours.server)


def test_replaced_files_are_used_and_a_ca_that_is_gone_counts_no_more(tmp_path):
    files = tls_files(tmp_path / "a")
    tls, other = Tls(files), Tls(tls_files(tmp_path / "b"))
    assert not tls.reload()
    old_client = tls.client
    files.key.write_text("half a key")
    with pytest.raises(SecurityError, match="certificate"):
        tls.reload()
    assert tls.client is old_client
    for name in ("127.0.0.1.pem", "127.0.0.1-key.pem", "ca.pem"):
        shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    assert tls.reload()
    assert handshake(other.client, tls.server)
    with pytest.raises(ssl.SSLError):
        handshake(old_client, tls.server)


def test_an_encrypted_key_asks_nobody_for_its_password(tmp_path):
    from cryptography.hazmat.primitives import serialization

    files = tls_files(tmp_path)
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(SecurityError, match="key"):
        Tls(files)
