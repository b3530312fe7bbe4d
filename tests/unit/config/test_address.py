"""HOST:PORT as the configuration writes it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_vllm.config import Address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7077", "127.0.0.1", 7077),
        ("Edge-1.Example.org:0", "edge-1.example.org", 0),
        ("[::1]:65535", "::1", 65535),
        ("[2001:DB8:0::1]:1", "2001:db8::1", 1),
    ],
)
def test_an_address_is_read_in_its_canonical_form(text: str, host: str, port: int) -> None:
    assert Address.parse(text) == Address(host, port)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("7077", "is not HOST:PORT"),
        (":7077", "is not HOST:PORT"),
        ("host:", "needs a port"),
        ("host:65536", "needs a port"),
        ("host:-1", "needs a port"),
        ("host:٣", "needs a port"),
        ("::1:7077", "needs brackets"),
        ("[::g]:7077", "no IPv6 address"),
        ("300.1.1.1:7077", "no valid IPv4 address"),
        ("1.2.3:7077", "no valid IPv4 address"),
        ("a b:7077", "no valid host name"),
        ("-a:7077", "no valid host name"),
        ("a..b:7077", "no valid host name"),
        ("http://a:7077", "needs brackets"),
        ("a" * 64 + ":7077", "no valid host name"),
    ],
)
def test_a_malformed_address_is_refused_with_its_fault(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Address.parse(text)


@pytest.mark.parametrize(
    ("text", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.8.8:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example.org:1", False),
    ],
)
def test_only_addresses_of_this_machine_count_as_loopback(text: str, loopback: bool) -> None:
    assert Address.parse(text).is_loopback is loopback


@given(st.ip_addresses(), st.integers(0, 65535))
def test_every_ip_address_survives_writing_and_reading(host: object, port: int) -> None:
    address = Address(str(host), port)
    assert Address.parse(str(address)) == address


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_and_never_crashes(text: str) -> None:
    try:
        address = Address.parse(text)
    except ValueError:
        return
    assert Address.parse(str(address)) == address
