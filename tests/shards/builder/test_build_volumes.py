"""Deep pixels and volumes: series of DICOM files, NIfTI, arrays; windows, slices, Hounsfield units."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zstandard
from pydicom.uid import generate_uid

import shards.builder.prepare
from shards.builder.canonical import resize_to_canonical
from shards.builder.members import decode_npy, decode_stored, read_member
from shards.dataset import load_snapshot
from shards.formats.intensity import IntensityRule, measure_window, scale_to_8_bit
from shards.hf.modalities import MODALITIES
from shards.hf.tokens import hf_token_indices
from shards.stores.store import open_store
from tests.shards.building import active_rows, build, index_rows, table_of
from tests.shards.formats.made import make_dicom, make_nifti, make_npy
from tests.shards.images import encode, read_tree

SECRETS = ("Doe", "Jane", "1970", "Hospital")


def draw_volume(seed: int, num: int = 40, side: int = 72) -> np.ndarray:
    """Slices with structure, (num, side, side) int16; later ones are brighter."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    disc = (y - side / 2) ** 2 + (x - side / 2) ** 2 < (side / 3) ** 2
    slices = [300 * disc * (1 + number / 10) + rng.normal(0, 40, (side, side)) for number in range(num)]
    return np.rint(np.stack(slices)).astype(np.int16)


def write_series(folder: Path, volume: np.ndarray, name: str = "mr", first: int = 0, **tags: object) -> None:
    """A file for each slice; the names do not follow the places."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "Modality": "MR",
        "SeriesInstanceUID": generate_uid(entropy_srcs=[name]),
        "PatientID": "Doe-1970",
        "PatientName": "Doe^Jane",
        "InstitutionName": "Hospital",
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "MagneticFieldStrength": 1.5,
    }
    for number, pixels in enumerate(volume, first):
        place = {"ImagePositionPatient": [0, 0, float(number)], "SOPInstanceUID": generate_uid()}
        data = make_dicom(pixels, **{**values, **place, **tags})
        (folder / f"{name}_{(number * 17) % 101:03d}.dcm").write_bytes(data)


def read_sample(root: Path, row: dict, shard: str) -> np.ndarray:
    data = read_member(open_store(root), shard, row, "image")
    return decode_stored(data, row["image_ext"], row["dtype"])


def samples_of(root: Path) -> list[tuple[dict, np.ndarray]]:
    """Rows and pixels, by volume and slice."""
    rows = sorted(active_rows(root), key=lambda row: (row["volume"] or "", row["slice"] or 0, row["object"]))
    return [(row, read_sample(root, row, row["shard"])) for row in rows]


def test_a_series_is_one_volume_with_one_window(tmp_path):
    volume = draw_volume(0)
    write_series(tmp_path / "source", volume)
    (tmp_path / "source" / "aaa.png").write_bytes(encode(np.tile(np.arange(72, dtype=np.uint8), (72, 1))))
    root = tmp_path / "root"
    report = build(tmp_path / "source", root, modality="mri", shard_bytes=1)  # a shard for each unit
    assert report.counts.samples == 41
    assert report.num_shards == 41
    single, *slices = samples_of(root)
    assert (single[0]["volume"], single[0]["slice"]) == (None, None)
    assert [row["slice"] for row, _ in slices] == list(range(40))
    assert len({row["volume"] for row, _ in slices}) == 1
    assert len({row["patient"] for row, _ in slices}) == 1
    window = measure_window(list(volume), MODALITIES["mri"].intensity)
    for (row, pixels), values in zip(slices, volume, strict=True):
        assert (row["dtype"], row["image_ext"]) == ("uint8", "npy.zst")
        small = pixels.astype(int) - resized(scale_to_8_bit(values, window))
        assert np.abs(small).max() <= 1
    assert slices[-1][1].mean() > 1.5 * slices[0][1].mean()  # the contrast between slices is kept


def resized(pixels: np.ndarray) -> np.ndarray:
    return resize_to_canonical(pixels, 64).astype(int)


def test_neither_the_cut_nor_what_is_held_changes_a_series(tmp_path, monkeypatch):
    write_series(tmp_path / "source", draw_volume(0, 36))
    build(tmp_path / "source", tmp_path / "whole", modality="mri")
    expected = {row["key"]: pixels for row, pixels in samples_of(tmp_path / "whole")}
    monkeypatch.setattr("shards.builder.series.HELD_BYTES", 30_000)
    build(tmp_path / "source", tmp_path / "held", modality="mri")
    assert read_tree(tmp_path / "held") == read_tree(tmp_path / "whole")
    build(tmp_path / "source", tmp_path / "cut", modality="mri", shard_bytes=20_000)
    found = {row["key"]: pixels for row, pixels in samples_of(tmp_path / "cut")}
    assert len(load_snapshot(tmp_path / "cut").shards) > 2
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in found)


def test_a_series_that_grows_is_numbered_on(tmp_path):
    volume = draw_volume(0, 38)
    root = tmp_path / "root"
    write_series(tmp_path / "source", volume[:34])
    build(tmp_path / "source", root, modality="mri")
    write_series(tmp_path / "source", volume[34:], first=34)
    report = build(tmp_path / "source", root, modality="mri")
    assert (report.change.num_new, report.counts.samples) == (4, 38)
    rows = [row for row, _ in samples_of(root)]
    assert [row["slice"] for row in rows] == list(range(38))
    assert len({row["volume"] for row in rows}) == 1


def test_two_series_in_one_folder(tmp_path):
    for number, name in enumerate(("a", "b")):
        write_series(tmp_path / "source", draw_volume(number, 4), name)
    build(tmp_path / "source", tmp_path / "root", modality="mri")
    rows = index_rows(tmp_path / "root")
    assert [row["slice"] for row in rows] == [0, 1, 2, 3] * 2
    assert [len({row["volume"] for row in half}) for half in (rows[:4], rows[4:])] == [1, 1]


def test_hounsfield_units_are_stored_as_they_are(tmp_path):
    volume = draw_volume(1, 3, 96) * 2 - 1000
    write_series(tmp_path / "source", volume, Modality="CT", RescaleSlope=1, RescaleIntercept=-24)
    (tmp_path / "source" / "scan.nii.gz").write_bytes(make_nifti(volume.transpose(2, 1, 0), is_gzip=True))
    root = tmp_path / "root"
    report = build(tmp_path / "source", root, modality="ct", size=96)
    assert report.counts.samples == 6
    found = {}
    for row, pixels in samples_of(root):
        assert (row["dtype"], row["image_ext"], row["channels"]) == ("int16", "npy.zst", 1)
        found.setdefault(row["volume"], []).append(pixels)
        tokens = decode_npy(read_member(open_store(root), row["shard"], row, "hf"))
        np.testing.assert_array_equal(tokens, hf_token_indices(pixels, 16, 1.0, MODALITIES["ct"].hf))
    assert len(found) == 2
    stacks = [np.stack(stack) for stack in found.values()]
    assert any(np.array_equal(stack, np.clip(volume - 24, -1024, 3071)) for stack in stacks)
    assert any(abs(stack.mean() - np.clip(volume, -1024, 3071).mean()) < 0.01 for stack in stacks)


def test_deep_pixels_are_averaged_before_they_are_rounded(tmp_path):
    values = (np.arange(128 * 128).reshape(128, 128) % 400 - 1000).astype(np.int16)
    write_series(tmp_path / "source", values[None], Modality="CT")
    build(tmp_path / "source", tmp_path / "root", modality="ct")
    ((_, pixels),) = samples_of(tmp_path / "root")
    means = values.reshape(64, 2, 64, 2).mean(axis=(1, 3))
    assert pixels.dtype == np.int16
    np.testing.assert_allclose(pixels, means, atol=0.51)


def test_flat_slices_and_arrays(tmp_path):
    volume = draw_volume(2, 4)
    volume[1] = 7
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "volume.npy").write_bytes(make_npy(volume.astype(np.float32)))
    (tmp_path / "source" / "brain.nii").write_bytes(make_nifti(volume.transpose(2, 1, 0)))
    report = build(tmp_path / "source", tmp_path / "root", modality="mri")
    assert report.quarantined == {"flat": 2}
    assert (report.counts.units, report.counts.samples) == (8, 6)
    assert {row["unit"] for row in table_of(tmp_path / "root", "quarantine")} <= {1, 2}  # RAS+ may turn it
    window = measure_window(list(volume), IntensityRule(scope="volume"))
    assert window[0] < window[1]


def test_settings_change_the_rule(tmp_path):
    write_series(tmp_path / "source", draw_volume(3, 2), WindowCenter=300, WindowWidth=100)
    build(tmp_path / "source", tmp_path / "plain", modality="mri")
    build(tmp_path / "source", tmp_path / "voi", modality="mri", intensity={"prefer_voi": True})
    (_, plain), *_ = samples_of(tmp_path / "plain")
    (_, voi), *_ = samples_of(tmp_path / "voi")
    assert np.isin(voi, (0, 255)).mean() > 2 * np.isin(plain, (0, 255)).mean()


def test_a_slice_that_is_lost_changes_no_other(tmp_path, monkeypatch):
    volume = draw_volume(4, 34)
    write_series(tmp_path / "source", volume)
    victim = sorted((tmp_path / "source").iterdir())[5]

    def lose(part: object, *args: object, save=shards.builder.prepare.save_part) -> None:
        save(part, *args)
        victim.unlink()

    monkeypatch.setattr("shards.builder.prepare.save_part", lose)
    report = build(tmp_path / "source", tmp_path / "root", modality="mri")
    assert report.quarantined == {"changed": 1}
    assert report.counts.samples == 33
    assert len({row["slice"] for row in index_rows(tmp_path / "root")}) == 33


def test_no_tag_that_names_anybody_is_in_the_dataset(tmp_path):
    volume = draw_volume(5, 3)
    for name, modality in (("mr", "MR"), ("ct", "CT")):
        write_series(tmp_path / "JaneSource", volume, name, Modality=modality)
    for modality in ("mri", "ct"):
        build(tmp_path / "JaneSource", tmp_path / "root", modality=modality, source="pacs")
    files = read_tree(tmp_path / "root")
    uid = generate_uid(entropy_srcs=["mr"]).encode()
    for name, data in files.items():
        for text in (*(secret.encode() for secret in SECRETS), uid, str(tmp_path).encode()):
            assert text not in data, name
            assert text not in name.encode()
    told = []
    for row, _ in samples_of(tmp_path / "root"):
        data = read_member(open_store(tmp_path / "root"), row["shard"], row, "json")
        text = data.decode() + repr(row)
        assert not any(secret in text for secret in SECRETS)
        told.append(json.loads(data)["acquisition"])
        if row["image_ext"] == "npy.zst":
            packed = read_member(open_store(tmp_path / "root"), row["shard"], row, "image")
            assert not any(secret.encode() in zstandard.decompress(packed) for secret in SECRETS)
    assert all(facts["field_tesla"] == pytest.approx(1.5) for facts in told)  # what is allowed is there
