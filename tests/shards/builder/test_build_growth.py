"""Sources that grow, change and shrink, and what is tried again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import shards.builder.scan
import shards.builder.writer
from shards.builder.build import plan_build
from shards.dataset import load_snapshot
from shards.formats.common import Unreadable
from shards.support.errors import ConfigError, DataError
from tests.shards.building import active_rows, build, index_rows, known_keys, make_config, table_of
from tests.shards.images import draw, encode, read_tree, write_images


@pytest.fixture
def source(tmp_path) -> Path:
    return write_images(tmp_path / "source", [f"a{number:02d}.png" for number in range(40)])


@pytest.fixture
def root(tmp_path, source) -> Path:
    """A dataset of the source: two shards."""
    build(source, tmp_path / "root")
    return tmp_path / "root"


def names_of(root: Path, rows: list[dict]) -> list[str]:
    known = known_keys(root)
    return sorted(os.fsdecode(known[row["key"]]["uri"]).rsplit("/", 1)[1] for row in rows)


def kinds_of(root: Path) -> dict[str, str]:
    """Kind of each row of the duplicates table, by key."""
    return {row["key"]: row["kind"] for row in table_of(root, "duplicates")}


def test_new_objects_become_further_shards(tmp_path, source, root):
    before, pinned = read_tree(root), load_snapshot(root)
    write_images(source, ["0first.png", "b.png", "z.png"], 500)
    (source / "same_bytes.png").write_bytes((source / "a00.png").read_bytes())
    (source / "same_pixels.png").write_bytes(encode(draw(1), compress_level=1))
    report = build(source, root)
    assert (report.change.num_new, report.change.num_known) == (5, 40)
    assert (report.num_shards, report.num_reused) == (3, 2)
    assert (report.counts.objects, report.counts.samples, report.counts.duplicates) == (45, 43, 2)
    assert report.counts.is_closed
    after = read_tree(root)
    assert all(after[name] == before[name] for name in before if name != "dataset.json")
    snapshot = load_snapshot(root)
    assert [shard.path for shard in snapshot.shards][:2] == [shard.path for shard in pinned.shards]
    assert snapshot.builds[0].plan_digests[0] == pinned.builds[0].plan_digests[0]
    assert len(snapshot.builds[0].plan_digests) == 2
    assert load_snapshot(root, pinned.hash) == pinned
    rows = index_rows(root)
    assert len({row["key"] for row in rows}) == len(rows) == 44
    kinds = {row["kind"]: row for row in table_of(root, "duplicates")}
    assert names_of(root, [kinds["bytes"]]) == ["same_bytes.png"]
    assert names_of(root, [kinds["pixels"]]) == ["same_pixels.png"]
    assert names_of(root, [{"key": kinds["pixels"]["duplicate_of"]}]) == ["a01.png"]

    again = build(source, root)
    assert again.snapshot == report.snapshot
    assert again.bytes_written == 0
    assert read_tree(root) == after


def test_the_parts_of_a_plan_give_the_same_bytes_elsewhere(tmp_path, source, root):
    write_images(source, ["b.png"], 500)
    build(source, root)
    build(source, tmp_path / "other", state=tmp_path / "root.state")
    assert read_tree(tmp_path / "other") == read_tree(root)


def test_touched_and_moved_objects_are_the_same(tmp_path, source, root):
    before = read_tree(root)
    for path in source.iterdir():
        os.utime(path, (1, 1))
    report = build(source.rename(tmp_path / "moved"), root)
    assert (report.change.num_known, report.change.num_changed) == (40, 0)
    assert read_tree(root) == before
    # the new places are remembered: a shard can be written again from there
    (root / "fundus" / "images-000001.tar").unlink()
    assert build(tmp_path / "moved", root).num_reused == 1
    assert read_tree(root) == before


def test_an_object_that_changed_is_replaced(source, root):
    old = {name: row for row in index_rows(root) for name in names_of(root, [row])}["a07.png"]
    before = read_tree(root)
    (source / "a07.png").write_bytes(encode(draw(900)))
    report = build(source, root)
    assert (report.change.num_changed, report.change.num_new) == (1, 0)
    counts = report.counts
    assert (counts.objects, counts.units, counts.samples, counts.duplicates) == (41, 41, 40, 1)
    assert counts.is_closed
    (gone,) = table_of(root, "duplicates")
    assert (gone["key"], gone["kind"]) == (old["key"], "superseded")
    (new,) = [row for row in active_rows(root) if row["key"] == gone["duplicate_of"]]
    assert new["object"] == 40
    assert old["key"] not in {row["key"] for row in active_rows(root)}
    assert names_of(root, active_rows(root)) == sorted(path.name for path in source.iterdir())
    after = read_tree(root)
    assert all(after[name] == before[name] for name in before if name != "dataset.json")
    (source / "a07.png").write_bytes(encode(draw(901)))  # and once more
    counts = build(source, root).counts
    assert (counts.objects, counts.samples, counts.duplicates) == (42, 40, 2)
    assert counts.is_closed


def test_what_repeated_a_replaced_object_steps_in(tmp_path, source):
    (source / "b_bytes.png").write_bytes((source / "a05.png").read_bytes())
    (source / "c_bytes.png").write_bytes((source / "a05.png").read_bytes())
    (source / "d_pixels.png").write_bytes(encode(draw(6), compress_level=1))
    root = tmp_path / "root"
    build(source, root)
    clinic = tmp_path / "clinic"
    clinic.mkdir()
    (clinic / "e_pixels.png").write_bytes(encode(draw(6), compress_level=2))
    write_images(clinic, ["other.png"], 700)
    build(clinic, root, source="clinic")
    assert sorted(kinds_of(root).values()) == ["bytes", "bytes", "pixels", "pixels"]

    for name, seed in (("a05.png", 800), ("a06.png", 801)):
        (source / name).write_bytes(encode(draw(seed)))
    report = build(source, root)
    assert report.change.num_changed == 2
    snapshot = load_snapshot(root)
    assert all(item.counts.is_closed for item in snapshot.builds)
    active = names_of(root, [row for row in active_rows(root) if row["shard"].startswith("fundus/images")])
    assert "b_bytes.png" in active  # it was nowhere, now it is a sample
    assert "c_bytes.png" not in active
    assert "d_pixels.png" in active  # its pixels count again
    kinds = sorted(kinds_of(root).values())
    assert kinds == ["bytes", "pixels", "superseded", "superseded"]  # c; e, of d now; a05 and a06
    rows = {row["kind"]: row for row in table_of(root, "duplicates")}
    assert names_of(root, [{"key": rows["bytes"]["duplicate_of"]}]) == ["b_bytes.png"]
    assert names_of(root, [{"key": rows["pixels"]["duplicate_of"]}]) == ["d_pixels.png"]
    assert rows["pixels"]["source"] == "clinic"


def test_samples_of_vanished_objects_stay(source, root):
    before = read_tree(root)
    (source / "a07.png").unlink()
    report = build(source, root)
    assert (report.change.num_vanished, report.change.num_known) == (1, 39)
    assert report.counts.samples == 40
    assert read_tree(root) == before
    (root / "fundus" / "images-000000.tar").unlink()  # but then a lost shard cannot be made again
    with pytest.raises(DataError, match=r"images-000000\.tar.*cannot be built again"):
        build(source, root)
    assert not (root / "fundus" / "images-000000.tar").exists()


@pytest.fixture
def broken(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """Readers that fail: TIFF headers, and the units whose number is asked for."""
    with monkeypatch.context() as patch:

        def read_header(blob, options, read=shards.builder.scan.read_header):
            if blob.name.endswith(".tif"):
                raise Unreadable("missing_reader", "tifffile")
            return read(blob, options)

        def make_sample(decoded, window, blob, item, unit, spec, make=shards.builder.writer.make_sample):
            if item.name.endswith((b"a03.png", b"a04.png")):
                raise Unreadable("damaged")
            return make(decoded, window, blob, item, unit, spec)

        patch.setattr(shards.builder.scan, "read_header", read_header)
        patch.setattr(shards.builder.writer, "make_sample", make_sample)
        yield patch


def test_what_was_quarantined_is_tried_again(tmp_path, source, broken):
    write_images(source, ["scan.tif"], 600)
    (source / "garbage.png").write_bytes(b"garbage")
    root = tmp_path / "root"
    first = build(source, root)
    assert first.quarantined == {"missing_reader": 1, "damaged": 2, "not_an_image": 1}
    keys = {name: row["key"] for row in table_of(root, "quarantine") for name in names_of(root, [row])}
    same = build(source, root)
    assert same.snapshot == first.snapshot

    broken.undo()
    second = build(source, root, retry_quarantined=True)
    assert second.quarantined == {"not_an_image": 1}
    assert second.change.num_retried == 3
    assert (second.counts.objects, second.counts.units, second.counts.samples) == (42, 42, 41)
    assert second.counts.is_closed
    rows = active_rows(root)
    mended = {name: row["key"] for row in rows for name in names_of(root, [row])}
    assert all(mended[name] == keys[name] for name in ("scan.tif", "a03.png", "a04.png"))
    assert len(mended) == len(rows) == 41
    before = read_tree(root)
    third = build(source, root, retry_quarantined=True)  # what fails again stays, once
    assert third.snapshot == second.snapshot
    assert read_tree(root) == before


def test_what_fails_again_stays_quarantined_once(tmp_path, source, broken):
    root = tmp_path / "root"
    build(source, root)
    report = build(source, root, retry_quarantined=True)
    assert report.quarantined == {"damaged": 2}
    assert report.counts.is_closed
    assert len(table_of(root, "quarantine")) == 2


def test_a_dry_run_tells_and_writes_nothing(tmp_path, source, capsys):
    (source / "bad.png").write_bytes(b"garbage")
    (source / "notes.txt").write_bytes(b"words")
    (source / "same.png").write_bytes((source / "a00.png").read_bytes())
    root = tmp_path / "root"
    plan = plan_build([source], root, make_config())
    assert not root.exists()
    assert (plan.num_units, plan.units, plan.num_shards) == (40, {"png": 40}, 2)
    assert (plan.duplicates, plan.quarantined, plan.excluded) == (1, {"not_an_image": 1}, {"not_an_image": 1})
    assert not plan.is_measured
    assert "an assumption" in "\n".join(plan.lines())

    report = build(source, root)
    assert (report.change.num_new, report.change.num_known) == (43, 0)
    assert 0.5 < plan.num_bytes / report.num_bytes < 2
    fresh = build(source, tmp_path / "fresh")
    assert fresh.counts == report.counts
    assert read_tree(tmp_path / "fresh") == read_tree(root)  # a dry run leaves no trace in the bytes

    write_images(source, ["b.png"], 500)
    before = read_tree(root)
    plan = plan_build([source], root, make_config())
    assert (plan.change.num_new, plan.change.num_known, plan.num_units, plan.num_shards) == (1, 43, 1, 1)
    assert plan.is_measured
    assert "measured" in "\n".join(plan.lines())
    assert read_tree(root) == before


def test_a_dry_run_is_forgotten_when_the_source_is_another_one(tmp_path, source):
    plan_build([source], tmp_path / "root", make_config())
    write_images(source, ["b.png"], 500)
    build(source, tmp_path / "root")
    build(source, tmp_path / "fresh")
    assert read_tree(tmp_path / "root") == read_tree(tmp_path / "fresh")


def test_another_folder_under_the_same_name_replaces_nothing(tmp_path, source, root):
    before = read_tree(root)
    names = [path.name for path in sorted(source.iterdir())]
    same_names = write_images(tmp_path / "same_names", names, first_seed=100)
    other_names = write_images(tmp_path / "other_names", ["b.png"], first_seed=100)
    for other in (same_names, other_names):
        with pytest.raises(ConfigError, match=r"fundus/images: .*none of its objects.*--source-name"):
            build(other, root)
    assert read_tree(root) == before
    build(same_names, root, source="others")
    assert load_snapshot(root).counts.samples == 80
