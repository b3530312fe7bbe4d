"""Calibration files: what is written is read, what is damaged is refused."""

import contextlib
import dataclasses
import random
import zipfile

import numpy as np
import pytest
from lossy_kv import calibration

from mcp_vllm.codec import CodecError, rotation
from mcp_vllm.codec.calibration import Calibration
from mcp_vllm.codec.transform import to_coefficients, to_values


def test_a_saved_calibration_is_read_back_the_same(tmp_path):
    path = tmp_path / "folder" / "made.npz"
    calibration().save(path)
    read = Calibration.load(path)
    assert str(read) == str(calibration())
    assert [band.sources for band in read.bands] == [band.sources for band in calibration().bands]


def test_the_fingerprint_depends_on_every_array_and_not_on_the_name():
    made = calibration()
    renamed = dataclasses.replace(made, model="other")
    assert renamed.fingerprint == made.fingerprint
    seen = {made.fingerprint}
    for name in ("mean", "analysis", "synthesis", "deviation"):
        changed = dataclasses.replace(made.bands[0], **{name: getattr(made.bands[0], name) * 2})
        seen.add(dataclasses.replace(made, bands=(changed, *made.bands[1:])).fingerprint)
    seen.add(dataclasses.replace(made, tail=made.tail * 0.5).fingerprint)
    assert len(seen) == 6


def test_damaged_files_raise_codec_errors_only(tmp_path):
    path = tmp_path / "made.npz"
    calibration().save(path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(20):
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged[: rng.randrange(len(whole))] if rng.random() < 0.3 else damaged)
        with contextlib.suppress(CodecError):
            Calibration.load(path)


@pytest.mark.parametrize("kind", [np.complex64, np.float16, bool, ">f4"])
def test_a_tail_of_another_type_is_refused(kind):
    with pytest.raises(CodecError, match="tail"):
        dataclasses.replace(calibration(), tail=calibration().tail.astype(kind))


def test_values_so_large_that_a_result_could_be_infinite_are_refused():
    band = calibration().bands[0]
    with pytest.raises(CodecError, match="synthesis"):
        dataclasses.replace(band, synthesis=band.synthesis * np.float32(1e30)).check()


def test_a_description_that_nests_too_deeply_is_an_error_of_the_file(tmp_path):
    path = tmp_path / "made.npz"
    np.savez(path, description=np.frombuffer(b"[" * 200_000, np.uint8))
    with pytest.raises(CodecError, match="codec calibrate"):
        Calibration.load(path)


def test_a_pickle_in_the_file_is_not_opened(tmp_path):
    path = tmp_path / "made.npz"
    np.savez(path, description=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CodecError):
        Calibration.load(path)


def test_a_compressed_member_is_refused_before_it_is_inflated(tmp_path):
    path = tmp_path / "made.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("description.npy", bytes(1 << 20))
    with pytest.raises(CodecError, match="compressed"):
        Calibration.load(path)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(CodecError, match="mcp-vllm codec calibrate MODEL"):
        Calibration.load(tmp_path / "none.npz")


def test_coefficients_are_decorrelated_and_give_the_values_back():
    band = calibration().bands[1]
    values = np.random.default_rng(0).normal(size=(50, len(band.mean))).astype(np.float32)
    coefficients = to_coefficients(values, band, len(band.deviation))
    restored = to_values(coefficients, band)
    np.testing.assert_allclose(restored, values, atol=1e-3)


def test_the_transform_of_tensors_is_that_of_arrays():
    torch = pytest.importorskip("torch")
    band = calibration().bands[0]
    values = np.random.default_rng(0).normal(size=(50, len(band.mean))).astype(np.float32)
    tensor = torch.from_numpy(values)
    for num_kept in (5, len(band.deviation)):
        ours = to_coefficients(values, band, num_kept)
        theirs = to_coefficients(tensor, band, num_kept)
        np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-4, atol=1e-4)
        restored = to_values(theirs, band).numpy()
        np.testing.assert_allclose(restored, to_values(ours, band), rtol=1e-4, atol=1e-4)


def test_a_rotation_taken_off_and_put_back_changes_nothing_for_tensors_and_arrays():
    torch = pytest.importorskip("torch")
    head = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    cosines, sines = rotation.angles(np.array([1.0, 0.25], np.float32), 100, 5)
    turned, tensor = head.copy(), torch.from_numpy(head.copy())
    rotation.rotate(turned, cosines, -sines)
    rotation.rotate(tensor, torch.from_numpy(cosines), torch.from_numpy(-sines))
    np.testing.assert_allclose(tensor.numpy(), turned, atol=1e-6)
    assert (turned[:, :4] != head[:, :4]).all()
    rotation.rotate(turned, cosines, sines)
    np.testing.assert_allclose(turned, head, atol=1e-6)
