"""Session archives: what goes in comes out, in pieces of any size; damage never passes."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_vllm.codec.loss import EXACT, LOSSY_TIERS
from mcp_vllm.session.archive import (
    ArchivedFrame,
    ArchiveError,
    ArchiveReader,
    ArchiveWriter,
    decode_manifest,
    encode_manifest,
)
from mcp_vllm.session.manifest import Manifest, SessionKey

keys = st.binary(min_size=5, max_size=40)
names = st.text("abc", min_size=1, max_size=5)
manifests = st.builds(
    Manifest,
    key=st.builds(SessionKey, names, names),
    namespace=st.binary(min_size=16, max_size=16),
    chains=st.lists(st.lists(keys, max_size=4, unique=True), max_size=3),
    num_tokens=st.integers(0, 1 << 40),
    turns=st.integers(0, 1000),
    created_s=st.floats(0, 2e9),
    last_used_s=st.floats(0, 2e9),
    loss=st.sampled_from((EXACT, *LOSSY_TIERS)),
)
frames = st.builds(
    ArchivedFrame, st.binary(min_size=1, max_size=100), st.sampled_from((EXACT, *LOSSY_TIERS))
)


def write(manifest, chunks) -> bytes:
    writer = ArchiveWriter()
    pieces = [writer.start(manifest)]
    for chunk in chunks:
        pieces += writer.add(chunk)
    return b"".join([*pieces, writer.end()])


def read(pieces):
    reader = ArchiveReader()
    chunks = [chunk for piece in pieces for chunk in reader.feed(piece)]
    reader.close()
    return reader.manifest, chunks


MANIFEST = Manifest(
    key=SessionKey("t", "s"), namespace=b"n" * 16, chains=[[b"12345"]], num_tokens=16, turns=1,
    created_s=1.0, last_used_s=2.0,
)  # fmt: skip
ARCHIVE = write(MANIFEST, [ArchivedFrame(b"frame one", EXACT), ArchivedFrame(b"two", "small")])


@given(manifests, st.lists(frames, max_size=5), st.lists(st.integers(1, 50), min_size=1))
def test_round_trip_in_pieces_of_any_size(manifest, chunks, sizes):
    data = write(manifest, chunks)
    pieces, position = [], 0
    while position < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[position : position + size])
        position += size
    assert read(pieces) == (manifest, chunks)


@pytest.mark.parametrize("size", range(len(ARCHIVE)))
def test_every_truncation_is_noticed(size):
    with pytest.raises(ArchiveError):
        read([ARCHIVE[:size]])


@given(st.integers(0, 8 * len(ARCHIVE) - 1))
def test_every_flipped_bit_is_noticed(bit):
    damaged = bytearray(ARCHIVE)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ArchiveError):
        read([bytes(damaged)])


def test_bytes_after_the_end_are_noticed():
    for pieces in ([ARCHIVE + b"x"], [ARCHIVE, b"x"]):
        with pytest.raises(ArchiveError):
            read(pieces)


@given(st.binary(max_size=200))
def test_garbage_is_no_archive(garbage):
    with pytest.raises(ArchiveError):
        read([garbage])


def test_claims_are_bounded_before_anything_is_collected():
    huge = b"MCPS\x01" + (1 << 31).to_bytes(4, "little")
    with pytest.raises(ArchiveError, match="claims a manifest"):
        read([huge])


def test_a_chain_that_has_a_key_twice_is_malformed():
    twice = msgspec.structs.replace(MANIFEST, chains=[[b"12345", b"23456", b"12345"]])
    with pytest.raises(ArchiveError, match="twice"):
        decode_manifest(encode_manifest(twice))
