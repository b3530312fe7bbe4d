"""The framing refuses what is not ours, too long, or malformed, before it allocates anything."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_vllm.split import wire
from mcp_vllm.split.errors import WireError
from mcp_vllm.split.wire import HEADER, Hello, Kind, NewRequest, Step


def test_a_header_comes_back_as_it_was():
    packed = wire.pack_header(Kind.ACTS, 12, 3456, 78)
    assert len(packed) == HEADER.size == 28
    header = wire.unpack_header(packed, 12, 3456)
    assert header == wire.Header(Kind.ACTS, 12, 3456, 78)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (b"GET / HTTP/1.1\r\nHost: stage\r\n", "does not speak"),
        (HEADER.pack(b"MCPS", 2, 7, 0, 0, 0, 0), "protocol version 2"),
        (HEADER.pack(b"MCPS", 1, 7, 1, 0, 0, 0), "protocol version"),
        (HEADER.pack(b"MCPS", 1, 99, 0, 0, 0, 0), "message type 99"),
        (HEADER.pack(b"MCPS", 1, 1, 0, 1 << 31, 0, 0), "metadata of 2147483648 bytes"),
        (HEADER.pack(b"MCPS", 1, 6, 0, 0, 1 << 60, 0), "payload of"),
    ],
)
def test_a_header_that_cannot_be_is_refused_by_name(header, complaint):
    with pytest.raises(WireError, match=complaint):
        wire.unpack_header(header[: HEADER.size], 1 << 16, 1 << 20)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_wire_error(raw):
    for kind in (Hello, Step, wire.Welcome, wire.KvInit, wire.Acts, wire.Error):
        try:
            wire.decode(kind, raw)
        except WireError:
            continue


@given(st.binary(min_size=28, max_size=28))
def test_any_header_is_within_bounds_or_a_wire_error(raw):
    try:
        header = wire.unpack_header(raw, 100, 1000)
    except WireError:
        return
    assert header.metadata_bytes <= 100
    assert header.payload_bytes <= 1000


def test_a_step_counts_its_tokens():
    new = [NewRequest(1, 30, 0, [[4, 5]])]
    step = Step([], new, [], [(1, 17), (2, 1)], [], [])
    again = wire.decode(Step, msgspec.msgpack.encode(step))
    assert again == step
    assert again.num_tokens == 18


def test_a_step_has_no_field_for_tokens_text_or_sampling():
    fields = {*Step.__struct_fields__, *NewRequest.__struct_fields__}
    fields |= {*wire.Continued.__struct_fields__, *wire.Acts.__struct_fields__}
    assert fields == {
        "finished", "new", "continued", "scheduled", "zeroed", "copies",
        "alias", "prompt_len", "num_computed", "blocks", "order",
    }  # fmt: skip
