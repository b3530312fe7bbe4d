"""A sealed frame opens as what it was sealed as, with the key that it was sealed with, or not."""

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_security import seal_keys

from mcp_vllm.codec import (
    ChunkLayout,
    CodecError,
    FrameError,
    encode_frame,
    get_codec,
    read_header,
)
from mcp_vllm.codec.loss import LOSSES
from mcp_vllm.security import xaes
from mcp_vllm.security.errors import SecurityError
from mcp_vllm.security.seals import (
    SealError,
    Seals,
    key_id_of,
    read_sealed_header,
)

NAMESPACE, KEY, TENANT = b"n" * 16, b"k" * 36, "acme"
RAW = np.arange(4096, dtype=np.uint8)
FRAME = encode_frame(KEY, RAW.data, ChunkLayout("bf16", 64), get_codec("zstd"))
CLEAR_BYTES = 72 + len(KEY)


def seals(folder: Path, *entries: str | tuple[str, str], name: str = "seal-keys.yaml") -> Seals:
    return Seals(seal_keys(folder, *entries, name=name))


@pytest.mark.parametrize(
    ("key", "associated", "expected"),
    [
        (b"\1", b"", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"),
        (
            b"\3",
            b"c2sp.org/XAES-256-GCM",
            "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d",
        ),
    ],
)
def test_the_cipher_is_the_one_of_the_specification(
    key: bytes, associated: bytes, expected: str
) -> None:
    nonce = b"ABCDEFGHIJKLMNOPQRSTUVWX"
    sealed = xaes.encrypt(key * 32, nonce, b"XAES-256-GCM", associated)
    assert sealed.hex() == expected
    assert xaes.decrypt(key * 32, nonce, sealed, associated) == b"XAES-256-GCM"


def test_a_sealed_frame_opens_and_says_in_the_clear_what_a_cache_needs(tmp_path: Path) -> None:
    ours = seals(tmp_path, "a")
    sealed = ours.seal(FRAME, NAMESPACE, TENANT, "balanced")
    assert ours.open(sealed, NAMESPACE, TENANT) == FRAME
    header, inner = read_sealed_header(sealed, max_raw_size=4096), read_header(
        FRAME, max_raw_size=4096
    )  # fmt: skip
    assert (header.key, header.raw_size, header.layout) == (KEY, 4096, inner.layout)
    assert (header.codec_name, header.loss, header.key_id) == (inner.codec_name, "balanced", "a")
    assert len(sealed) - len(FRAME) == CLEAR_BYTES + 16 + 8
    assert FRAME[CLEAR_BYTES:] not in sealed
    assert ours.seal(sealed, NAMESPACE, TENANT, "") == sealed, "it is not sealed twice"


def test_a_nonce_comes_back_with_the_very_same_frame_only(tmp_path: Path) -> None:
    """Every part that is sealed or bound, changed alone, and everything twice."""
    ours, other_key = seals(tmp_path, "a"), seals(tmp_path, "b", name="b.yaml")
    layout, raw = ChunkLayout("bf16", 64), get_codec("raw")
    frames = [FRAME, *(encode_frame(key, RAW.data, layout, raw) for key in (KEY, b"q" * 36))]
    changed = RAW.copy()
    changed[-1] ^= 1
    frames.append(encode_frame(KEY, changed.data, layout, raw))
    many = [
        who.seal(frame, namespace, tenant, loss)
        for who in (ours, other_key)
        for frame in frames
        for namespace in (NAMESPACE, b"m" * 16)
        for tenant in (TENANT, "beta")
        for loss in ("", "small")
        for _ in range(2)
    ]
    nonces = {read_sealed_header(each, max_raw_size=4096).nonce for each in many}
    assert len(nonces) == len(set(many)) == len(many) // 2


@pytest.mark.parametrize(
    ("namespace", "tenant"), [(b"m" * 16, TENANT), (NAMESPACE, "beta"), (NAMESPACE, "acme ")]
)
def test_a_sealed_frame_is_nothing_to_another_tenant_or_engine(
    tmp_path: Path, namespace: bytes, tenant: str
) -> None:
    ours = seals(tmp_path, "a")
    sealed = ours.seal(FRAME, NAMESPACE, TENANT, "")
    with pytest.raises(SealError, match="not what it was sealed as"):
        ours.open(sealed, namespace, tenant)


def with_checksum(sealed: bytes) -> bytes:
    """What an attacker does, who can compute checksums too."""
    import xxhash

    return sealed[:-8] + xxhash.xxh3_64_digest(sealed[:-8])


def replayed(sealed: bytes, at: int, value: bytes) -> bytes:
    return with_checksum(sealed[:at] + value + sealed[at + len(value) :])


@pytest.mark.parametrize(
    ("what", "at", "value"),
    [
        ("another chunk's key", 72, b"x"),
        ("another codec", 5, b"\0"),
        ("a lossy one as exact", 7, b"\0"),
        ("another key id", 32, b"b"),
        ("another nonce", 48, b"\0\0\0\0"),
        ("another raw size", 16, (4095).to_bytes(8, "little")),
        ("other content", 200, b"\0\0\0\0"),
    ],
)
def test_a_sealed_frame_replayed_as_another_is_refused(
    tmp_path: Path, what: str, at: int, value: bytes
) -> None:
    ours = seals(tmp_path, "a", "b")
    sealed = ours.seal(FRAME, NAMESPACE, TENANT, "small")
    changed = replayed(sealed, at, value)
    assert changed != sealed
    read_sealed_header(changed, max_raw_size=4096)  # nobody without the key can tell
    with pytest.raises(SealError):
        ours.open(changed, NAMESPACE, TENANT)


def test_another_version_is_refused(tmp_path: Path) -> None:
    sealed = seals(tmp_path, "a").seal(FRAME, NAMESPACE, TENANT, "")
    with pytest.raises(FrameError, match="version"):
        read_sealed_header(replayed(sealed, 4, b"\2"), max_raw_size=4096)


def test_the_first_key_seals_and_the_older_ones_open(tmp_path: Path) -> None:
    old = seals(tmp_path, "k2025").seal(FRAME, NAMESPACE, TENANT, "")
    both = seals(tmp_path, "k2026", "k2025")
    assert key_id_of(both.seal(FRAME, NAMESPACE, TENANT, "")) == "k2026"
    assert both.open(old, NAMESPACE, TENANT) == FRAME
    assert both.opens(TENANT, old)
    later = seals(tmp_path, "k2026")
    assert not later.opens(TENANT, old)
    with pytest.raises(SealError, match="'k2025', which is not here"):
        later.open(old, NAMESPACE, TENANT)


def test_a_tenants_own_key_is_nothing_to_others_and_a_master_key_serves_all(tmp_path: Path) -> None:
    ours = seals(tmp_path, ("acme-1", "acme"), "m")
    assert key_id_of(ours.seal(FRAME, NAMESPACE, "acme", "")) == "acme-1"
    assert key_id_of(ours.seal(FRAME, NAMESPACE, "beta", "")) == "m"
    only_acme = seals(tmp_path, ("acme-1", "acme"), name="one.yaml")
    assert only_acme.key_ids("beta") == ()
    assert only_acme.seal(FRAME, NAMESPACE, "beta", "") == FRAME
    assert not only_acme.opens("beta", ours.seal(FRAME, NAMESPACE, "beta", ""))


def test_replaced_keys_are_taken_and_bad_ones_are_not(tmp_path: Path) -> None:
    ours = seals(tmp_path, "a")
    assert not ours.reload()
    seal_keys(tmp_path, "b", "a")
    assert ours.reload()
    assert ours.key_ids(TENANT) == ("b", "a")
    (tmp_path / "seal-keys.yaml").write_text("- id: c\n")
    with pytest.raises(SecurityError):
        ours.reload()
    assert ours.key_ids(TENANT) == ("b", "a")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "nonsense: [",
        "- id: a\n  key_file: missing.key",
        "- id: a\n  key_file: short.key",
        "- id: 'a b'\n  key_file: good.key",
        "- id: ''\n  key_file: good.key",
        "- id: much-too-long-for-an-id\n  key_file: good.key",
        "- id: a\n  key_file: good.key\n- id: a\n  key_file: good.key",
        "- id: a\n  key_file: good.key\n  kind: x",
    ],
)
def test_a_key_file_that_is_no_good_is_refused_without_a_word_of_its_content(
    tmp_path: Path, text: str
) -> None:
    secret = os.urandom(32).hex()
    (tmp_path / "good.key").write_text(secret)
    (tmp_path / "short.key").write_text(secret[:40])
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(SecurityError) as refused:
        Seals(path)
    assert "seal keys" in str(refused.value)
    assert secret[:16] not in str(refused.value)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_whatever_is_fed_to_it_fails_in_our_own_words_and_never_opens_as_something_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    ours = _shared(tmp_path_factory)
    sealed = bytearray(ours.seal(FRAME, NAMESPACE, TENANT, data.draw(st.sampled_from(LOSSES))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(sealed) - 1))
        sealed[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(sealed)))
    fed = bytes(sealed[:cut]) if data.draw(st.booleans()) else with_checksum(bytes(sealed))
    with contextlib.suppress(CodecError):
        assert ours.open(fed, NAMESPACE, TENANT) in (FRAME, fed)


_KEPT: list[Seals] = []


def _shared(factory: pytest.TempPathFactory) -> Seals:
    if not _KEPT:
        _KEPT.append(seals(factory.mktemp("keys"), "a"))
    return _KEPT[0]
