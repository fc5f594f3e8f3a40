"""Every unit is a sample or has a reason; sources without any sample leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import shards.builder.writer
from shards.dataset import load_snapshot, read_index
from shards.formats.common import Unreadable
from shards.support.errors import DataError
from tests.shards.building import build, index_rows, table_of
from tests.shards.images import draw, encode, write_images


def bad_inputs(folder: Path) -> dict[str, str]:
    """Write one of each bad input; return the reason code that each must get."""
    good = encode(draw(700))
    jpeg = encode(draw(701), "JPEG")
    flat = np.full((90, 90), 90, np.uint8)
    contents = {
        "garbage.png": (b"no image at all", "not_an_image"),
        "header_only.png": (good[:16] + bytes(range(200)), "damaged"),
        "cut.png": (good[: len(good) // 2], "truncated"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "zero.png": (b"", "zero_bytes"),
        "bomb.png": (encode(np.zeros((300, 300), np.uint8)), "too_many_pixels"),
        "flat.png": (encode(flat), "flat"),
        "pixel.png": (encode(flat[:1, :1]), "too_small"),
        "scan.dcm": (bytes(128) + b"DICM", "damaged"),
        "old.gif": (b"GIF89a" + bytes(20), "unsupported_format"),
        "notes.txt": (b"hello", "not_an_image"),
        ".DS_Store": (b"\0\0\0\1Bud1", "not_an_image"),
        "empty.txt": (b"", "zero_bytes"),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    (folder / "broken.png").symlink_to(folder / "nowhere")
    return {name: reason for name, (_, reason) in contents.items()} | {"broken.png": "unreadable_file"}


EXCLUDED = {"old.gif", "notes.txt", ".DS_Store", "empty.txt"}


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_object_is_accounted_for(tmp_path, jobs):
    source = write_images(tmp_path / "source", [f"good_{number:02d}.png" for number in range(40)])
    expected = bad_inputs(source)
    (source / "same_bytes.png").write_bytes((source / "good_00.png").read_bytes())
    (source / "same_pixels.png").write_bytes(encode(draw(1), compress_level=1))
    root = tmp_path / "root"
    report = build(source, root, max_pixels=80_000, jobs=jobs)

    quarantine, duplicates = table_of(root, "quarantine"), table_of(root, "duplicates")
    order = sorted(path.name for path in source.iterdir())
    found = {order[row["object"]]: row["reason"] for row in quarantine}
    assert found == expected
    assert {order[row["object"]] for row in quarantine if row["status"] == "excluded"} == EXCLUDED
    assert {(order[row["object"]], row["kind"]) for row in duplicates} == {
        ("same_bytes.png", "bytes"),
        ("same_pixels.png", "pixels"),
    }
    counts = report.counts
    assert counts.is_closed
    assert counts.objects == counts.units == 40 + len(expected) + 2
    assert (counts.samples, counts.quarantined) == (40, len(expected) - len(EXCLUDED))
    assert (counts.excluded, counts.duplicates) == (len(EXCLUDED), 2)
    assert sum(report.quarantined.values()) == counts.quarantined
    assert sum(report.excluded.values()) == counts.excluded

    rows = index_rows(root)
    everywhere = [row["object"] for row in rows] + [row["object"] for row in quarantine]
    everywhere += [row["object"] for row in duplicates if row["kind"] == "bytes"]
    assert sorted(everywhere) == list(range(counts.objects))
    (same_pixels,) = [row for row in duplicates if row["kind"] == "pixels"]
    keys = {row["key"]: order[row["object"]] for row in rows}
    assert keys[same_pixels["key"]] == "same_pixels.png"
    places = {path.path: read_index(root, path)["key"] for path in load_snapshot(root).shards}
    assert places[same_pixels["shard"]][same_pixels["row"]].as_py() == same_pixels["key"]
    assert {keys[row["duplicate_of"]] for row in duplicates} == {"good_00.png", "good_01.png"}


def test_a_shard_of_bad_units_only(tmp_path):
    source = write_images(tmp_path / "source", [f"z{number}.png" for number in range(32)])
    for number in range(32):  # the first shard
        pixels = np.full((90, 90), number, np.uint8)
        (source / f"a{number:02d}.png").write_bytes(encode(pixels))
    report = build(source, tmp_path / "root")
    assert report.quarantined == {"flat": 32}
    assert report.num_shards == 2
    assert [item.path for item in load_snapshot(tmp_path / "root").shards] == ["fundus/images-000001.tar"]
    assert build(source, tmp_path / "root").num_reused == 2


def test_units_that_a_rule_excludes(tmp_path, monkeypatch):
    source = write_images(tmp_path / "source", [f"{number}.png" for number in range(3)])

    def refuse(decoded, window, blob, item, unit, spec, make=shards.builder.writer.make_sample):
        if item.number == 1:
            raise Unreadable("no_tissue")
        return make(decoded, window, blob, item, unit, spec)

    monkeypatch.setattr(shards.builder.writer, "make_sample", refuse)
    report = build(source, tmp_path / "root")
    assert (report.excluded, report.quarantined) == ({"no_tissue": 1}, {})
    assert (report.counts.samples, report.counts.excluded) == (2, 1)
    again = build(source, tmp_path / "root", retry_quarantined=True)  # nothing is wrong with it
    assert again.snapshot == report.snapshot


def test_an_empty_folder_leaves_nothing_behind(tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(DataError, match="to mend it"):
        build(tmp_path / "source", tmp_path / "root")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_of_text_files(tmp_path):
    (tmp_path / "source").mkdir()
    for number in range(3):
        (tmp_path / "source" / f"{number}.txt").write_text(f"words {number}")
    with pytest.raises(DataError, match=r"not_an_image 3.*to mend it"):
        build(tmp_path / "source", tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_images_of_which_none_can_be_used(tmp_path):
    write_images(tmp_path / "source", ["a.png", "b.png"], height=30, width=30)
    with pytest.raises(DataError, match=r"too_small 2.*min_side"):
        build(tmp_path / "source", tmp_path / "root")
    assert not list((tmp_path / "root").rglob("*.parquet"))
    assert build(tmp_path / "source", tmp_path / "root", min_side=16).counts.samples == 2
