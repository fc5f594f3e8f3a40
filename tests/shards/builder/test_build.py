"""Building: what is written, and the same bytes however it went."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zstandard
from PIL import Image

import shards.builder.build
import shards.builder.writer
from shards.dataset import load_snapshot, read_index
from shards.formats.pictures import decode_image
from shards.hf.maps import hf_map
from shards.hf.modalities import MODALITIES
from shards.hf.tokens import hf_response, hf_token_indices
from shards.support.errors import ConfigError, DataError, EnvironmentFault
from tests.shards.building import build, index_rows, make_config, make_source, table_of
from tests.shards.images import draw, encode, read_tree, write_images

FUNDUS = MODALITIES["fundus"].hf


@pytest.fixture
def source(tmp_path) -> Path:
    """Seventy images: three shards."""
    return make_source(tmp_path / "source")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a dataset of these images, built without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    build(make_source(folder / "source"), folder / "root")
    return read_tree(folder / "root")


def test_plain_webdataset_reads_a_shard(tmp_path, source):
    build(source, tmp_path / "root")
    rows = {row["key"]: row for row in index_rows(tmp_path / "root")}
    tars = sorted(map(str, (tmp_path / "root" / "fundus").glob("*.tar")))
    assert len(tars) == 3
    seen = 0
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        row = rows[sample["__key__"]]
        pixels = decode_image(sample[row["image_ext"]])
        assert pixels.shape == (row["height"], row["width"], row["channels"])
        np.testing.assert_array_equal(
            np.load(io.BytesIO(sample["hf.npy"])), hf_token_indices(pixels, 16, 1.0, FUNDUS)
        )
        stored_map = np.load(io.BytesIO(zstandard.decompress(sample["hfmap.npy.zst"])))
        np.testing.assert_array_equal(stored_map, hf_map(hf_response(pixels, FUNDUS), 4))
        about = json.loads(sample["json"])
        assert about["height"] == row["height"]
        assert about["labels"] == {}
        seen += 1
    assert seen == len(rows) == 70


def test_index_points_at_the_members(tmp_path, source):
    root = tmp_path / "root"
    build(source, root)
    shard = load_snapshot(root).shards[0]
    data = (root / shard.path).read_bytes()
    assert len(data) == shard.num_bytes
    for row in read_index(root, shard).to_pylist():
        image = data[row["image_offset"] :][: row["image_size"]]
        assert decode_image(image).shape[:2] == (row["height"], row["width"])
        assert json.loads(data[row["json_offset"] :][: row["json_size"]])["object"] == row["object"]


def test_canonical_images(tmp_path):
    source = tmp_path / "source"
    write_images(source, ["a_large.png", "b_large.jpg"], height=100, width=150)
    write_images(source, ["c_small.png", "d_small.jpg"], 5, height=70, width=80)
    build(source, tmp_path / "root", size=80)
    rows = sorted(index_rows(tmp_path / "root"), key=lambda row: row["object"])
    assert [(row["height"], row["width"]) for row in rows] == [(80, 120), (80, 120), (70, 80), (70, 80)]
    assert [(row["source_height"], row["source_width"]) for row in rows] == [(100, 150)] * 2 + [(70, 80)] * 2
    assert [row["image_ext"] for row in rows] == ["png", "png", "png", "jpg"]


def test_jpeg_of_canonical_size_keeps_its_pixels_and_loses_its_metadata(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe"
    (tmp_path / "source").mkdir()
    data = encode(draw(0, 64, 70), "JPEG", exif=exif, comment=b"Jane Doe")
    (tmp_path / "source" / "x.jpg").write_bytes(data)
    build(tmp_path / "source", tmp_path / "root")
    shard = next((tmp_path / "root").rglob("*.tar")).read_bytes()
    (row,) = index_rows(tmp_path / "root")
    stored = shard[row["image_offset"] :][: row["image_size"]]
    assert row["image_ext"] == "jpg"
    assert b"Jane" in data
    assert b"Jane" not in shard
    np.testing.assert_array_equal(decode_image(stored), decode_image(data))


def test_pages_are_units_of_one_volume(tmp_path):
    pages = [Image.fromarray(draw(seed)) for seed in range(3)]
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    write_images(tmp_path / "source", ["a.png"], 9)
    (tmp_path / "source" / "b.tif").write_bytes(buffer.getvalue())
    report = build(tmp_path / "source", tmp_path / "root")
    assert (report.counts.objects, report.counts.units, report.counts.samples) == (2, 4, 4)
    single, *volume = sorted(index_rows(tmp_path / "root"), key=lambda row: (row["object"], row["unit"]))
    assert (single["volume"], single["slice"]) == (None, None)
    assert [row["slice"] for row in volume] == [0, 1, 2]
    assert len({row["volume"] for row in volume}) == 1
    assert len({row["key"] for row in volume}) == 3


def test_built_twice_gives_the_same_bytes(tmp_path, source, whole):
    build(source, tmp_path / "root")
    assert read_tree(tmp_path / "root") == whole


def test_neither_jobs_nor_place_nor_times_change_the_bytes(tmp_path, source, whole):
    for path in source.iterdir():
        os.utime(path, (1, 1))
    build(source.rename(tmp_path / "moved"), tmp_path / "root", jobs=2)
    assert read_tree(tmp_path / "root") == whole


def test_the_state_folder_carries_the_salt(tmp_path, source):
    for name in ("one", "two"):
        build(source, tmp_path / name, salt=None, state=tmp_path / "state")
    build(source, tmp_path / "three", salt=None)
    assert read_tree(tmp_path / "one") == read_tree(tmp_path / "two")
    keys = [{row["key"] for row in index_rows(tmp_path / name)} for name in ("one", "three")]
    assert not keys[0] & keys[1]
    with pytest.raises(ConfigError, match="another salt"):
        build(source, tmp_path / "one", state=tmp_path / "state")


def test_a_second_build_does_nothing_again(tmp_path, source, monkeypatch):
    first = build(source, tmp_path / "root")
    before = read_tree(tmp_path / "root")
    monkeypatch.setattr(shards.builder.writer, "make_sample", lambda *args: pytest.fail("made again"))
    second = build(source, tmp_path / "root")
    assert read_tree(tmp_path / "root") == before
    assert (first.num_reused, second.num_reused) == (0, 3)
    assert (first.snapshot, first.counts) == (second.snapshot, second.counts)


def test_a_damaged_shard_is_written_again(tmp_path, source):
    root = tmp_path / "root"
    build(source, root)
    before = read_tree(root)
    tar, index = root / "fundus" / "images-000001.tar", root / "fundus" / "images-000002.index.parquet"
    tar.write_bytes(tar.read_bytes()[:-700])
    index.unlink()
    assert build(source, root).num_reused == 1
    assert read_tree(root) == before


def test_a_builder_that_was_faster_loses_nothing(tmp_path, source, monkeypatch):
    """To plan takes hours, and the destination is held only afterwards."""
    root, other = tmp_path / "root", tmp_path / "other.state"
    built: dict[str, bytes] = {}

    def plan_slowly(*args: object, prepare=shards.builder.build.prepare) -> object:
        ready = prepare(*args)
        if not built:
            built["dataset.json"] = b""
            build(source, root, state=other, salt="another salt than that")
            built.update(read_tree(root))
        return ready

    monkeypatch.setattr(shards.builder.build, "prepare", plan_slowly)
    with pytest.raises(EnvironmentFault, match="another program has written"):
        build(source, root)
    assert read_tree(root) == built


def test_a_second_modality_extends_the_dataset(tmp_path, source):
    root = tmp_path / "root"
    first = build(source, root)
    before = read_tree(root)
    pinned = load_snapshot(root)
    other = write_images(tmp_path / "other", ["a.png", "b.png"], 500)
    (other / "c.png").write_bytes((source / "patient_00.png").read_bytes())
    second = build(other, root, modality="dermoscopy", source="clinic")

    snapshot = load_snapshot(root)
    assert snapshot.hash == second.snapshot != first.snapshot
    assert snapshot.modalities == ["dermoscopy", "fundus"]
    assert [item.path for item in snapshot.shards if item.modality == "fundus"] == [
        item.path for item in pinned.shards
    ]
    assert snapshot.hf_digests == {name: MODALITIES[name].hf.digest() for name in ("dermoscopy", "fundus")}
    assert snapshot.counts == first.counts + second.counts
    assert second.counts.duplicates == 1
    (duplicate,) = table_of(root, "duplicates")
    assert (duplicate["modality"], duplicate["kind"]) == ("dermoscopy", "pixels")
    assert duplicate["duplicate_of"] in {row["key"] for row in index_rows(root)}

    assert load_snapshot(root, first.snapshot) == pinned
    unchanged = [name for name in before if name != "dataset.json"]
    after = read_tree(root)
    assert all(after[name] == before[name] for name in unchanged)
    build(source, root)  # once more the first: nothing moves
    assert read_tree(root) == after


def test_what_does_not_fit_the_dataset_is_refused(tmp_path, source):
    root = tmp_path / "root"
    build(source, root)
    before = read_tree(root)
    for options, words in (
        ({"size": 96}, "size is 96, the dataset's is 64"),
        ({"source": "more", "patch_size": 8}, "patch_size is 8"),
        ({"source": "more", "hf": {"cutoff_cycles": 9.0}}, "hf is"),
        ({"min_std": 2.0}, "built with another min_std"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(source, root, **options)
    with pytest.raises(DataError, match="another state folder"):
        build(source, root, state=tmp_path / "other_state", salt="f" * 16)
    with pytest.raises(ConfigError, match="size is 96"):  # before a long list is made
        build(tmp_path / "no_such_source", root, size=96)
    assert read_tree(root) == before


def test_settings_that_cannot_be():
    for options in (
        {"modality": "petscan"},
        {"modality": "ct", "source": "Has.Dot"},
        {"modality": "ct", "patch_size": 6},
        {"modality": "ct", "size": 16, "patch_size": 32},
        {"modality": "ct", "max_pixels": 0},
        {"modality": "ct", "colour": True},
    ):
        with pytest.raises(ValueError, match="validation error"):
            make_config(**options)
    with pytest.raises(ConfigError, match="cutof"):
        make_config(modality="ct", hf={"cutof": 1})
    with pytest.raises(ConfigError, match="low"):
        make_config(modality="ct", intensity={"low": "x"})


def test_destination_inside_the_source(tmp_path, source):
    with pytest.raises(ConfigError, match="inside the source"):
        build(source, source / "root")


def test_folder_labels_and_splits(tmp_path):
    names = ["train/sick/a.png", "train/well/b.png", "test/sick/c.png"]
    source = write_images(tmp_path / "source", names)
    build(source, tmp_path / "root", labels="folder")
    labels = [json.loads(row["labels"]) for row in index_rows(tmp_path / "root")]
    assert sorted(label["split"] + label["label"] for label in labels) == [
        "testsick",
        "trainsick",
        "trainwell",
    ]
    report = build(source, tmp_path / "trained", labels="folder", splits=("train",))
    assert (report.counts.samples, report.excluded) == (2, {"other_split": 1})


def test_a_table_that_labels_nothing_is_refused(tmp_path, source):
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path / "elsewhere", tmp_path):
        (folder / "labels.csv").write_text("filename,label\nsource/patient_03.png,drusen\n")
    root = tmp_path / "root"
    with pytest.raises(ConfigError, match="labels no object"):
        build(source, root, labels=str(tmp_path / "elsewhere" / "labels.csv"))
    assert not root.exists()
    build(source, root, labels=str(tmp_path / "labels.csv"))
    assert sum("drusen" in row["labels"] for row in index_rows(root)) == 1


def test_changed_labels_are_not_taken_for_the_same_source(tmp_path, source):
    table = tmp_path / "labels.csv"
    table.write_text("filename,label\nsource/patient_00.png,1\n")
    build(source, tmp_path / "root", labels=str(table))
    table.write_text("filename,label\nsource/patient_00.png,2\n")
    with pytest.raises(DataError, match="labels or patients of 1 objects"):
        build(source, tmp_path / "root", labels=str(table))
