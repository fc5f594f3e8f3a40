"""An audit as a whole: a whole dataset has no problem, and an unreachable store is no damage."""

from __future__ import annotations

import pytest

from shards.audit.verify import verify_dataset
from shards.builder.build import BuildConfig, build_dataset
from shards.dataset import load_snapshot, read_table
from shards.stores.store import LocalStore
from shards.support.errors import DataError, EnvironmentFault
from tests.shards.damage import (
    CT,
    FUNDUS,
    find,
    flip,
    kinds,
    member,
)
from tests.shards.images import draw, encode, write_images
from tests.shards.whole import (
    change_snapshot,
    change_tar,
)


@pytest.mark.parametrize("deep", [False, True])
def test_whole_dataset_has_no_problem(root, deep):
    report = find(root, deep=deep)
    assert report.ok
    assert not report.remarks
    assert (report.num_shards, report.num_samples) == (4, 12)
    assert report.snapshot == load_snapshot(root).hash
    assert report.lines()[-1] == "no problem found"
    report.check()


def test_what_the_builder_writes_is_whole(tmp_path):
    """Grown and changed, with repeats of both kinds and with what is no image."""
    photos = write_images(tmp_path / "photos", ["a.png", "b.jpg", "c.png", "d.png"])
    (photos / "broken.png").write_bytes(b"")
    (photos / "same.png").write_bytes((photos / "a.png").read_bytes())
    (photos / "alike.bmp").write_bytes(encode(draw(0), "BMP"))
    config = BuildConfig(modality="fundus", size=64, jobs=1, state=tmp_path / "state")
    build_dataset([str(photos)], str(tmp_path / "built"), config)
    (photos / "new.png").write_bytes(encode(draw(70)))
    (photos / "c.png").write_bytes(encode(draw(71)))
    build_dataset([str(photos)], str(tmp_path / "built"), config)
    report = find(tmp_path / "built", deep=True)
    assert report.ok
    assert report.remark_counts == {}
    snapshot = load_snapshot(tmp_path / "built")
    kinds = read_table(tmp_path / "built", snapshot, "duplicates")["kind"].to_pylist()
    assert sorted(kinds) == ["bytes", "pixels", "superseded"]


def test_processes_find_the_same(root):
    change_tar(root, CT, flip(member(root, CT, 1, "json")[0]))
    (root / FUNDUS).unlink()
    one, two = (verify_dataset(root, deep=True, jobs=jobs) for jobs in (1, 2))
    assert one == two
    assert one.counts == {"member_bytes": 1, "tar_bytes": 1, "missing_file": 1}


def test_pointer_and_snapshots(root, tmp_path):
    first = load_snapshot(root)
    second = change_snapshot(root, created_by="later")
    assert find(root, snapshot=first.hash).ok
    assert find(root, snapshot=first.hash).snapshot == first.hash
    (root / f"snapshots/{first.hash}.json").write_text("{}")
    report = find(root)  # the old one is no part of the current one, but a run may have pinned it
    assert report.counts == {"snapshot": 1}
    assert first.hash in report.problems[0].where
    (root / f"snapshots/{second.hash}.json").unlink()
    assert kinds(root) == {"snapshot": 1}
    (root / "dataset.json").write_text("{")
    assert kinds(root) == {"snapshot": 1}
    report = find(tmp_path / "nothing")
    assert "frepa shards build" in report.problems[0].fix
    with pytest.raises(DataError, match=r"1 problems.*no such dataset"):
        report.check()


def test_an_unreachable_store_is_no_damage(root, monkeypatch):
    def refuse(self, path, *where):
        raise EnvironmentFault("cannot be reached", where=path)

    monkeypatch.setattr(LocalStore, "num_bytes", refuse)
    with pytest.raises(EnvironmentFault):
        verify_dataset(root, jobs=1)


def test_hf_definition_of_another_version_is_a_remark(root):
    snapshot = load_snapshot(root)
    change_snapshot(root, hf={**snapshot.hf, "ct": {**snapshot.hf["ct"], "unheard_of": 1}})
    report = find(root, deep=True)
    assert report.ok
    assert report.remark_counts == {"hf_unknown": 1}
