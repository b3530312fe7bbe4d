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


def factories(asked):
    def get_raw():
        asked.append("raw")
        return get_codec("raw")

    return {"raw": get_raw}


def test_a_second_process_reads_what_the_first_measured(tmp_path):
    asked = []
    first = remembered(factories(asked), "1.0", tmp_path)
    assert remembered(factories(asked), "1.0", tmp_path) == first
    assert asked == ["raw"]
    remembered(factories(asked), "1.1", tmp_path)
    assert asked == ["raw", "raw"]


def test_a_damaged_file_is_replaced(tmp_path):
    remembered(factories([]), "1.0", tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b'{"raw": 3}')
    asked = []
    speeds = remembered(factories(asked), "1.0", tmp_path)
    assert asked == ["raw"]
    assert isinstance(speeds["raw"], Speed)
    assert remembered(factories(asked), "1.0", tmp_path) == speeds


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert remembered(factories([]), "1.0", tmp_path / "file")["raw"].ratio > 0.99
