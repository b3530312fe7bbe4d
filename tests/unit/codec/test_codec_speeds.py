"""Speeds of codecs: measured once a machine and version, and never in the way."""

from mcp_vllm.codec import get_codec
from mcp_vllm.codec.speeds import Speed, measure, remembered


def test_measured_speeds_are_positive_and_raw_has_ratio_one():
    speed = measure(get_codec("raw"))
    assert speed.encode_bytes_s > 0
    assert speed.decode_bytes_s > 0
    assert 0.99 < speed.ratio <= 1


def test_synthetic_kv_compresses_like_the_real_thing():
    assert measure(get_codec("zstd")).ratio > 1.2
    assert measure(get_codec("lossless")).ratio > 1.35


class Counting(type(get_codec("raw"))):
    """The raw codec, which counts how often it is asked to encode."""

    def __init__(self):
        self.num_encoded = 0

    def encode(self, raw, layout):
        self.num_encoded += 1
        return super().encode(raw, layout)


def test_a_second_process_reads_what_the_first_measured(tmp_path):
    first, second, third = Counting(), Counting(), Counting()
    speeds = remembered({"raw": first}, "1.0", tmp_path)
    assert first.num_encoded
    assert remembered({"raw": second}, "1.0", tmp_path) == speeds
    assert not second.num_encoded
    remembered({"raw": third}, "1.1", tmp_path)
    assert third.num_encoded


def test_a_damaged_file_is_replaced(tmp_path):
    remembered({"raw": Counting()}, "1.0", tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b'{"raw": 3}')
    again = Counting()
    speeds = remembered({"raw": again}, "1.0", tmp_path)
    assert again.num_encoded
    assert isinstance(speeds["raw"], Speed)
    assert remembered({"raw": Counting()}, "1.0", tmp_path) == speeds


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert remembered({"raw": Counting()}, "1.0", tmp_path / "file")["raw"].ratio > 0.99
