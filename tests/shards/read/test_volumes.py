"""Volumes as the builder's shards give them back: every slice, in order, whatever became of the others."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shards.dataset import load_snapshot
from shards.read.reader import ShardReader
from shards.read.volume_rows import SLICES_SCHEMA, shared_labels, split_by_volume
from shards.read.volumes import Volume, list_volumes, read_volume, volume_table, volume_window
from shards.read.windows import CT_WINDOWS, REFERENCE_WINDOW, to_unit_range
from shards.support.errors import ConfigError, DataError
from tests.shards.builder.test_build_volumes import draw_volume, write_series
from tests.shards.building import build, table_of
from tests.shards.formats.made import make_nifti
from tests.shards.images import encode


def as_nifti(slices: np.ndarray) -> bytes:
    """A file whose axial slices are (F, H, W), as the reader shows them: right to left, front to back."""
    return make_nifti(np.ascontiguousarray(slices.transpose(2, 1, 0)[::-1, ::-1]))


def write_volumes(folder: Path, volumes: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, slices in volumes.items():
        (folder / f"{name}.nii").write_bytes(as_nifti(slices))
    return folder


def write_labels(folder: Path, rows: list[dict[str, str]]) -> str:
    path = folder / "labels.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def open_all(root: Path, **options: object) -> tuple[list[Volume], ShardReader]:
    snapshot = load_snapshot(root)
    return list_volumes(root, snapshot, **options), ShardReader(root, snapshot)


def ct(seed: int, num: int = 12, side: int = 64) -> np.ndarray:
    """Hounsfield units with air, (num, side, side) int16."""
    return np.clip(draw_volume(seed, num, side) - 1000, -1024, 3071).astype(np.int16)


def test_slices_come_back_in_order_from_many_shards_in_hounsfield_units(tmp_path):
    volumes = {"one": ct(0), "two": ct(1, num=7)}
    source = write_volumes(tmp_path / "source", volumes)
    rows = [
        {"filename": "one.nii", "label": "tumor", "split": "train", "patient": "Doe"},
        {"filename": "two.nii", "label": "none", "split": "test", "patient": "Roe"},
    ]
    root = tmp_path / "root"
    build(source, root, modality="ct", shard_bytes=1, labels=write_labels(source, rows))
    found, reader = open_all(root)
    assert len(load_snapshot(root).shards) == 19
    assert {v.labels["label"]: (len(v.slices), v.split, v.num_missing, v.num_repeated) for v in found} == {
        "tumor": (12, "train", 0, 0),
        "none": (7, "test", 0, 0),
    }
    assert len({v.patient for v in found}) == 2
    assert not {"Doe", "Roe", None} & {v.patient for v in found}
    assert len({v.group for v in found}) == 2
    for volume in found:
        expected = volumes["one" if volume.labels["label"] == "tumor" else "two"]
        pixels, window, slices = read_volume(reader, volume)
        assert pixels.dtype == np.int16
        np.testing.assert_array_equal(pixels, expected)
        assert window == REFERENCE_WINDOW
        assert slices.tolist() == list(range(len(expected)))
        shown = to_unit_range(torch.from_numpy(pixels)[:, None], torch.tensor([window] * len(pixels)))
        np.testing.assert_allclose(shown[:, 0].numpy(), np.clip((expected + 1000.0) / 2000, 0, 1), atol=1e-6)
    table = volume_table(found)
    assert table["num_slices"].to_pylist() == [len(v.slices) for v in found]
    assert sorted(table["split"].to_pylist()) == ["test", "train"]


def test_a_series_of_files_is_a_volume_and_single_images_are_none(tmp_path):
    volume = draw_volume(3, num=9)
    write_series(tmp_path / "source", volume)
    (tmp_path / "source" / "single.png").write_bytes(encode(np.tile(np.arange(72, dtype=np.uint8), (72, 1))))
    build(tmp_path / "source", tmp_path / "root", modality="mri")
    (found,), reader = open_all(tmp_path / "root")
    pixels, window, _ = read_volume(reader, found)
    assert (pixels.shape, pixels.dtype, window) == ((9, 64, 64), np.uint8, (0.0, 255.0))
    discs = pixels[:, 30:40, 30:40].mean(axis=(1, 2))
    assert (np.diff(discs) > 0).all()  # later slices are brighter, whatever their files are called


def test_a_slice_that_repeats_another_volumes_is_still_a_slice_and_links_the_two(tmp_path):
    volumes = {name: ct(seed) for seed, name in enumerate("abcd")}
    volumes["c"][4] = volumes["a"][9]
    volumes["c"][7] = volumes["c"][6]  # and one that repeats its own neighbor
    build(write_volumes(tmp_path / "source", volumes), tmp_path / "root", modality="ct")
    assert [row["kind"] for row in table_of(tmp_path / "root", "duplicates")] == ["pixels"] * 2
    found, reader = open_all(tmp_path / "root")
    read = {v.name: read_volume(reader, v).pixels for v in found}
    assert [len(pixels) for pixels in read.values()] == [12] * 4
    by_content = {
        name: next(v for v in found if np.array_equal(read[v.name], volumes[name])) for name in "abcd"
    }
    assert {name: v.num_repeated for name, v in by_content.items()} == {"a": 1, "b": 0, "c": 3, "d": 0}
    groups = {name: v.group for name, v in by_content.items()}
    assert groups["a"] == groups["c"]
    assert len(set(groups.values())) == 3


def test_volumes_of_a_patient_are_one_group_over_other_volumes(tmp_path):
    volumes = {name: ct(seed) for seed, name in enumerate("abcd")}
    volumes["b"][0] = volumes["c"][0]
    source = write_volumes(tmp_path / "source", volumes)
    rows = [
        {"filename": f"{n}.nii", "label": n, "patient": p}
        for n, p in zip("abcd", ["p", "p", "q", ""], strict=True)
    ]
    build(source, tmp_path / "root", modality="ct", labels=write_labels(source, rows))
    found, _ = open_all(tmp_path / "root")
    groups = {v.labels["label"]: v.group for v in found}
    assert groups["a"] == groups["b"] == groups["c"] != groups["d"]
    assert next(v for v in found if v.labels["label"] == "d").patient is None


def test_a_slice_that_was_refused_leaves_a_gap(tmp_path):
    volume = ct(0)
    volume[5] = -1000  # flat
    build(write_volumes(tmp_path / "source", {"one": volume}), tmp_path / "root", modality="ct")
    (found,), reader = open_all(tmp_path / "root")
    assert found.slices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert found.num_missing == 1
    np.testing.assert_array_equal(read_volume(reader, found).pixels, np.delete(volume, 5, axis=0))


def test_a_replaced_volume_is_only_there_as_it_is_now(tmp_path):
    source = write_volumes(tmp_path / "source", {"one": ct(0), "two": ct(1)})
    build(source, tmp_path / "root", modality="ct")
    write_volumes(source, {"one": ct(2)})
    os.utime(source / "one.nii", (1, 1))
    build(source, tmp_path / "root", modality="ct")
    assert {row["kind"] for row in table_of(tmp_path / "root", "duplicates")} == {"superseded"}
    found, reader = open_all(tmp_path / "root")
    read = [read_volume(reader, v).pixels for v in found]
    assert len(read) == 2
    for expected in (ct(1), ct(2)):
        assert any(np.array_equal(pixels, expected) for pixels in read)


def test_slices_of_unequal_size_are_refused_as_stored_and_cut_at_a_size(tmp_path):
    volume = draw_volume(0, num=8)
    write_series(tmp_path / "source", volume[:5])
    write_series(tmp_path / "source", volume[5:, :66, :], name="mr", first=5)
    build(tmp_path / "source", tmp_path / "root", modality="mri")
    (found,), reader = open_all(tmp_path / "root")
    with pytest.raises(DataError, match=r"slice 5 .* 64 x 70, .* 64 x 64.*with a `size`"):
        read_volume(reader, found)
    assert read_volume(reader, found, size=48).pixels.shape == (8, 48, 48)


def test_one_modality_and_what_is_not_there(tmp_path):
    build(write_volumes(tmp_path / "source", {"one": ct(0)}), tmp_path / "root", modality="ct")
    assert len(open_all(tmp_path / "root", modality="ct")[0]) == 1
    with pytest.raises(ConfigError, match=r"holds no 'mri'.*allowed: ct"):
        open_all(tmp_path / "root", modality="mri")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "x.png").write_bytes(encode(np.tile(np.arange(72, dtype=np.uint8), (72, 1))))
    build(tmp_path / "pictures", tmp_path / "other", modality="xray")
    assert open_all(tmp_path / "other")[0] == []


def slice_rows(volumes: list[str], slices: list[int]) -> pa.Table:
    num = len(slices)
    columns = {"volume": volumes, "slice": slices, "labels": ["{}"] * num, "patient": [None] * num}
    columns |= {"shard": [0] * num, "row": list(range(num)), "link": [None] * num}
    return pa.Table.from_pydict(columns, schema=SLICES_SCHEMA)


def test_slices_are_put_in_order_wherever_a_later_build_has_put_them():
    table = slice_rows(["b", "a", "b", "a", "b", "a"], [4, 7, 0, 2, 3, 5])
    parts = {table["volume"][int(part[0])].as_py(): part.tolist() for part in split_by_volume(table)}
    assert parts == {"a": [3, 5, 1], "b": [2, 4, 0]}
    assert split_by_volume(table.slice(0, 0)) == []


def test_a_number_that_is_given_twice_is_an_error():
    with pytest.raises(DataError, match="two samples are slice 7 of volume a"):
        split_by_volume(slice_rows(["a", "b", "a"], [7, 7, 7]))


def test_windows_of_ct_and_of_bytes():
    assert volume_window(np.dtype(np.uint8), "lung") == (0.0, 255.0)
    level, width = CT_WINDOWS["lung"]
    assert volume_window(np.dtype(np.int16), "lung") == (level - width / 2, level + width / 2)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.sampled_from("xy")), min_size=1))
def test_labels_are_shared_only_where_all_slices_agree(labels):
    same, varying = shared_labels(pa.chunked_array([[json.dumps(one) for one in labels]]))
    for name in "abc":
        values = {one.get(name) for one in labels}
        assert (name in same) == (len(values) == 1 and None not in values)
        assert (name in varying) == (len(values) > 1)
