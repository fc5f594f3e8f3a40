"""Building from S3 and into S3: the same bytes as in folders, whatever the server does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import shards.builder.prepare
from shards.builder.build import plan_build
from shards.support.errors import ConfigError, EnvironmentFault
from tests.s3.building import download, files_of, tars_of
from tests.s3.proxy import ALWAYS
from tests.shards.builder.test_build_volumes import draw_volume, write_series
from tests.shards.building import active_rows, build, make_config, table_of
from tests.shards.formats.made import make_nifti
from tests.shards.images import draw, encode, read_tree, write_images


@pytest.fixture
def tree(tmp_path) -> Path:
    """Images, a series, a volume, a table, and what is no image."""
    folder = write_images(
        tmp_path / "tree", [f"{number:02d}.{end}" for number in range(18) for end in ("png", "jpg")]
    )
    write_series(folder / "series", draw_volume(0, 6))
    (folder / "brain.nii.gz").write_bytes(make_nifti(draw_volume(1, 4).transpose(2, 1, 0), is_gzip=True))
    (folder / "same.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "notes.txt").write_bytes(b"words")
    (folder / "cut.png").write_bytes((folder / "01.png").read_bytes()[:500])
    return folder


def test_a_tree_in_s3_gives_the_tars_of_a_folder(s3, tree, tmp_path):
    source = s3.put_tree(tree, "hospital/tree/")
    here = build(tree, tmp_path / "here", modality="mri")
    there = build(source, tmp_path / "there", modality="mri")
    assert there.counts == here.counts
    assert there.quarantined == here.quarantined == {"truncated": 1}
    assert there.counts.samples == 36 + 6 + 4
    tars = tars_of(read_tree(tmp_path / "here"))
    assert len(tars) == 2
    assert tars_of(read_tree(tmp_path / "there")) == tars
    before = read_tree(tmp_path / "there")
    assert build(source, tmp_path / "there", modality="mri").snapshot == there.snapshot
    assert read_tree(tmp_path / "there") == before


def test_a_dataset_in_s3_has_the_files_of_a_folder(s3, tree, tmp_path):
    state = tmp_path / "state"
    with pytest.raises(ConfigError, match="state folder"):
        build(tree, f"{s3.uri}/data", modality="mri")
    there = build(tree, f"{s3.uri}/data", modality="mri", state=state, jobs=2)
    here = build(tree, tmp_path / "here", modality="mri", state=state)
    assert there.snapshot == here.snapshot
    assert download(s3, "data") == files_of(tmp_path / "here")
    write_images(tree, ["new.png"], 300)
    there = build(tree, f"{s3.uri}/data", modality="mri", state=state)
    assert (there.change.num_new, there.num_reused) == (1, here.num_shards)
    build(tree, tmp_path / "here", modality="mri", state=state)
    assert download(s3, "data") == files_of(tmp_path / "here")


def test_growth_change_and_loss_in_s3(s3, tmp_path, monkeypatch):
    for number in range(5):
        s3.put(f"in/{number}.png", encode(draw(number)))
    root, source = tmp_path / "root", f"{s3.uri}/in"
    assert build(source, root).counts.samples == 5
    s3.put("in/1.png", encode(draw(11)))
    s3.put("in/5.png", encode(draw(5)))
    s3.put("in/6.png", encode(draw(6)))
    s3.delete("in/2.png")

    def lose(part: object, *args: object, save=shards.builder.prepare.save_part) -> None:
        save(part, *args)
        s3.delete("in/5.png")
        s3.put("in/6.png", encode(draw(66)))

    with monkeypatch.context() as patch:
        patch.setattr("shards.builder.prepare.save_part", lose)
        report = build(source, root)
    change = report.change
    assert (change.num_new, change.num_changed, change.num_vanished, change.num_known) == (2, 1, 1, 3)
    assert report.quarantined == {"changed": 2}
    assert report.counts.is_closed
    assert len(active_rows(root)) == report.counts.samples == 5
    report = build(source, root)
    assert report.quarantined == {"changed": 1}
    assert report.counts.samples == 6
    assert [row["kind"] for row in table_of(root, "duplicates")] == ["superseded", "superseded"]


def test_the_plan_reads_heads_only(s3, faults, tmp_path):
    for number in range(3):
        s3.put(f"in/{number}.png", encode(draw(number, 600, 600)))
    plan = plan_build([f"{s3.uri}/in"], tmp_path / "root", make_config())
    assert plan.num_units == 3
    gets = [seen for seen in faults.seen if seen.method == "GET" and seen.key]
    assert len(gets) == 3
    assert all(seen.range for seen in gets)


def test_a_store_that_stays_away_stops_the_build(s3, faults, tmp_path):
    for number in range(3):
        s3.put(f"in/{number}.png", encode(draw(number)))
    faults.add("denied", key=r"in/1\.png$", attempts=ALWAYS)
    with pytest.raises(EnvironmentFault, match=r"in/1\.png.*denied"):
        build(f"{s3.uri}/in", tmp_path / "root")
    assert not (tmp_path / "root" / "dataset.json").exists()
    faults.clear()
    assert build(f"{s3.uri}/in", tmp_path / "root").counts.samples == 3
    with pytest.raises(EnvironmentFault, match="no such bucket"):
        build("s3://frepa-missing/in", tmp_path / "other")


def test_a_listing_of_objects_in_s3(s3, tmp_path):
    for number in range(3):
        s3.put(f"in/{number}.png", encode(draw(number)))
    rows = [f"{s3.uri}/in/{number}.png,sick,Doe" for number in (0, 2)]
    (tmp_path / "list.csv").write_text("\n".join(["uri,label,patient", *rows]) + "\n")
    s3.put("lists/list.csv", b"filename,label\n../in/none.png,x\n")
    report = build(tmp_path / "list.csv", tmp_path / "root")
    assert report.counts.samples == 2
    assert {row["labels"] for row in active_rows(tmp_path / "root")} == {'{"label":"sick"}'}
    report = build([tmp_path / "list.csv", f"{s3.uri}/in"], tmp_path / "both")
    assert (report.counts.samples, report.change.num_repeated) == (3, 2)


def test_a_worker_reads_ahead_of_a_slow_network(s3, faults, tmp_path):
    images = write_images(
        tmp_path / "tree", [f"{number:02d}.png" for number in range(24)], height=70, width=70
    )
    source = s3.put_tree(images, "in/")
    faults.add("delay", key=r"in/.*\.png$", method="GET", attempts=ALWAYS, seconds=0.2)
    start = time.monotonic()
    assert build(source, tmp_path / "root").counts.samples == 24
    waited = 0.2 * faults.count(r"in/.*\.png$", method="GET")
    assert time.monotonic() - start < 0.4 * waited  # plan and build read every object once
