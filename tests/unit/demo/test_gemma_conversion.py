"""Conversion of a GGUF file, on a tiny file made on the spot."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from mcp_vllm.demo.gemma_model import (  # noqa: E402
    hugging_face_name,
    to_bf16,
    write_configs,
    write_safetensors,
)
from mcp_vllm.demo.gemma_tokenizer import build_tokenizer  # noqa: E402
from mcp_vllm.demo.gguf_file import GgufFile, GgufFormatError  # noqa: E402

PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "  ", "<0x41>", "a", "b", "▁", "▁a", "▁ab", "ab"]
KINDS = [3, 3, 3, 3, 4, 6, 1, 1, 1, 1, 1, 1]
SCORES = [-1000.0] * 5 + [0.0, -10.0, -11.0, -12.0, -0.0, -1.0, -2.0]


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "gemma3")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(6)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(8)
    writer.add_token_list(PIECES)
    writer.add_token_scores(SCORES)
    writer.add_token_types(KINDS)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    random = np.random.default_rng(1)
    writer.add_tensor("output_norm.weight", np.full(32, 1.5, np.float32))
    embedding = random.normal(size=(len(PIECES), 32)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    quantized = gguf.quants.quantize(embedding, kind)
    writer.add_tensor("token_embd.weight", quantized, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    content = path.read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + header_bytes])
    body = content[8 + header_bytes :]
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            bits = np.frombuffer(body[start:end], np.uint16).reshape(entry["shape"])
            tensors[name] = (bits.astype(np.uint32) << 16).view(np.float32)
    return tensors


def test_reader_agrees_with_the_gguf_package(tiny_gguf: Path) -> None:
    ours, theirs = GgufFile(tiny_gguf), gguf.GGUFReader(str(tiny_gguf))
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.metadata[name] == field.contents()
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(mine.shape)
        assert np.array_equal(mine.float32_rows(0, len(mine.rows)).reshape(mine.shape), expected)


def test_a_file_that_is_not_gguf_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(GgufFormatError, match=r"other\.gguf"):
        GgufFile(path)


def test_norm_weights_lose_the_one_that_gguf_adds(tiny_gguf: Path, tmp_path: Path) -> None:
    totals: list[int] = []
    file = GgufFile(tiny_gguf)
    write_safetensors(file, tmp_path / "model.safetensors", totals.append)
    tensors = read_safetensors(tmp_path / "model.safetensors")
    assert np.all(tensors["model.norm.weight"] == 0.5)
    embedding = file.tensors["token_embd.weight"].float32_rows(0, len(PIECES))
    assert np.allclose(tensors["model.embed_tokens.weight"], embedding, rtol=2**-8)
    assert totals[-1] == (tmp_path / "model.safetensors").stat().st_size


def test_config_names_layer_types_and_both_rope_bases(tiny_gguf: Path, tmp_path: Path) -> None:
    write_configs(GgufFile(tiny_gguf).metadata, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10_000
    assert config["rope_parameters"]["full_attention"]["rope_theta"] == 1_000_000
    assert (config["sliding_window"], config["head_dim"], config["bos_token_id"]) == (8, 16, 2)


def test_tokenizer_puts_bos_first_and_merges_by_score(tiny_gguf: Path) -> None:
    tokenizer = build_tokenizer(GgufFile(tiny_gguf).metadata)
    assert tokenizer.encode("ab ab").tokens == ["<bos>", "ab", "▁ab"]
    assert tokenizer.encode("a  bA").tokens == ["<bos>", "a", "▁▁", "b", "<0x41>"]
    assert tokenizer.decode(tokenizer.encode("a  b aA").ids) == "a  b aA"


def test_tensor_of_another_architecture_is_refused_by_name() -> None:
    assert hugging_face_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    with pytest.raises(GgufFormatError, match="ssm_conv1d"):
        hugging_face_name("blk.0.ssm_conv1d.weight")


def test_bf16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-7], np.float32)
    rounded = (to_bf16(values).astype(np.uint32) << 16).view(np.float32)
    assert rounded.tolist() == [1.0, 1.0, 1.0 + 2**-6, -1.0 - 2**-7]
